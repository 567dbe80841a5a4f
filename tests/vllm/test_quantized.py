"""Quantized backbones: the streams run on vLLM's quantized layers, and stay in floating point themselves.

The layouts are written here by a few lines each, and what vLLM answers is held against transformers on the same folder
with its weights in floating point again, `dequantized`.
"""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, DynamicCache

import parscale

GROUP = 32  # weights that share a scale, where not all of an output do
NEW = 8
WEIGHTS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
PER_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}


def needs(capability, what):
    """Some of the CPU build's kernels are there for newer processors alone, with streams and without."""
    lacking = not torch.cpu.get_capabilities().get(capability)
    return pytest.mark.skipif(lacking, reason=f"{what}, and this processor has no {capability}")


SOME_IGNORED = {"self_attn.qkv_proj": ["q_proj", "k_proj", "v_proj"], "mlp.down_proj": ["down_proj"]}
AVX512 = needs("avx512_f", "vLLM has weights of four bits and a cache of eight for AVX-512 alone")
VNNI = needs("avx512_vnni", "without it oneDNN's sums of products of eight bits saturate")


def pack(values, dim):
    """Whole numbers from 0 to 15, eight in an int32, the first in the lowest bits."""
    values = values.movedim(dim, -1).to(torch.int64).unflatten(-1, (-1, 8))
    return (values << torch.arange(0, 32, 4)).sum(-1).to(torch.int32).movedim(-1, dim).contiguous()


def four_bits(weight):
    """`(O, I)` to numbers from -8 to 7 with their scales `(O, groups)`, and the product."""
    grouped = weight.unflatten(1, (-1, GROUP))
    scale = grouped.abs().amax(-1, keepdim=True) / 7
    q = (grouped / scale).round()
    return q.flatten(1), scale[..., 0], (q * scale).flatten(1)


def int8(weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    q = (weight / scale).round()
    return {"weight": q.to(torch.int8), "weight_scale": scale}, q * scale


def fp8(weight):
    scale = weight.abs().amax(1, keepdim=True) / 448
    q = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": q, "weight_scale": scale}, q.float() * scale


def packed(weight):
    q, scale, product = four_bits(weight)
    return {"weight_packed": pack(q + 8, 1), "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}, product


def gptq(weight):
    q, scale, product = four_bits(weight)
    groups, outputs = scale.T.shape
    zeros = pack(torch.full((groups, outputs), 7), 1)  # of which the format takes one off
    order = torch.arange(weight.shape[1], dtype=torch.int32) // GROUP
    return {"qweight": pack(q.T + 8, 0), "scales": scale.T.contiguous(), "qzeros": zeros, "g_idx": order}, product


def awq(weight):
    grouped = weight.unflatten(1, (-1, GROUP))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    scale = (high - low) / 15
    zero = (-low / scale).round().clamp(0, 15)
    q = (grouped / scale + zero).round().clamp(0, 15)

    def interleaved(x):
        return pack(x.unflatten(-1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]].flatten(-2), 1)

    stored = {"qweight": interleaved(q.flatten(1).T), "qzeros": interleaved(zero[..., 0].T)}
    return stored | {"scales": scale[..., 0].T.contiguous()}, ((q - zero) * scale).flatten(1)


def compressed(layout, weights, activations=None):
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


LAYOUTS = {
    "int8": (int8, compressed("int-quantized", WEIGHTS, PER_TOKEN)),
    "fp8": (fp8, compressed("float-quantized", WEIGHTS | {"type": "float"}, PER_TOKEN | {"type": "float"})),
    "packed": (
        packed,
        compressed("pack-quantized", WEIGHTS | {"num_bits": 4, "strategy": "group", "group_size": GROUP}),
    ),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False, "sym": True}),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
}


def quantized(source, folder, layout, ignored=()):
    """A folder with its linear layers in a layout of `LAYOUTS`, and one with those weights as they round."""
    quantize, settings = LAYOUTS[layout]
    small, plain = (shutil.copytree(source, folder / name) for name in ("small", "plain"))
    stored, rounded = {}, {}
    for name, tensor in load_file(source / "model.safetensors").items():
        module, _, part = name.rpartition(".")
        stored[name] = rounded[name] = tensor
        if part == "weight" and module.endswith("_proj") and module not in ignored:
            tensors, rounded[name] = quantize(tensor)
            del stored[name]
            stored |= {f"{module}.{part}": tensor for part, tensor in tensors.items()}
    save_file(stored, small / "model.safetensors", metadata={"format": "pt"})
    save_file(rounded, plain / "model.safetensors", metadata={"format": "pt"})
    if ignored:
        settings = settings | {"ignore": ["lm_head", *ignored]}
    configure(small, quantization_config=settings)
    return small, plain


def configure(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def dequantized(folder, dtype=torch.float32):
    return parscale.load(folder, dtype=dtype).eval()


def answers(serving, folder, lengths=(1, 20, 70), **arguments):
    """What vLLM answers to some prompts, and what its modules are."""
    with serving.engine(folder, **arguments) as llm:
        outputs = serving.greedy(llm, serving.prompts(lengths), NEW, logprobs=0, prompt_logprobs=0)
        return outputs, llm.apply_model(modules)[0]


def modules(model):
    """The backbone's layers that are not quantized, and the types of the streams' parameters."""
    plain = {name for name, part in model.named_modules() if is_plain(part) and "aggregate_layer" not in name}
    streams = {parameter.dtype for name, parameter in model.named_parameters() if "prefix" in name or "aggr" in name}
    return plain, streams


def is_plain(part):
    return type(getattr(part, "quant_method", None)).__name__ == "UnquantizedLinearMethod"


def served(outputs):
    """The log-probabilities of all tokens but the first of each prompt, as vLLM has them."""
    values = []
    for output in outputs:
        answer = output.outputs[0]
        entries = [*output.prompt_logprobs[1:], *answer.logprobs]
        tokens = [*output.prompt_token_ids[1:], *answer.token_ids]
        values += [entry[token].logprob for entry, token in zip(entries, tokens, strict=True)]
    return torch.tensor(values, dtype=torch.float64)


@torch.no_grad()
def expected(outputs, model, cache=None):
    """The same by a model of transformers."""
    values = []
    for output in outputs:
        ids = torch.tensor([[*output.prompt_token_ids, *output.outputs[0].token_ids]])
        options = {} if cache is None else {"past_key_values": cache(config=model.config), "use_cache": True}
        logprobs = model(ids, **options).logits[0, :-1].double().log_softmax(-1)
        values.append(logprobs.gather(1, ids[0, 1:, None])[:, 0])
    return torch.cat(values)


def apart(a, b):
    return (a - b).abs().mean().item()


@AVX512
@pytest.mark.parametrize(
    ("layout", "family", "num_streams", "fields"),
    [
        ("awq", "Qwen2", 4, {}),
        ("gptq", "Qwen3", 2, {}),
        ("packed", "Mistral", 4, {"sliding_window": 24}),
    ],
)
def test_weights_of_four_bits(make_folder, serving, tmp_path, layout, family, num_streams, fields):
    """vLLM's kernels compute in half precision: they may be off by twice of what transformers is off in it."""
    small, plain = quantized(make_folder(family, num_streams, **fields), tmp_path, layout)
    outputs, (unquantized, streams) = answers(serving, small, dtype="float16")
    assert unquantized == set()
    assert streams == {torch.float16, torch.float32}  # the latter: the aggregator's last projection, before a softmax
    truth = expected(outputs, dequantized(plain))
    assert apart(served(outputs), truth) <= 2 * apart(expected(outputs, dequantized(plain, torch.float16)), truth)


def round_inputs(model, ignored, to, largest):
    """Has a model round the inputs of its linear layers, each token's by its largest."""

    def hook(module, inputs):
        scale = inputs[0].abs().amax(-1, keepdim=True) / largest
        return (to(inputs[0] / scale) * scale,)

    for name, module in model.named_modules():
        if name.endswith("_proj") and name not in ignored:
            module.register_forward_pre_hook(hook)


@pytest.mark.parametrize(
    ("layout", "family", "num_streams", "ignored"),
    [
        pytest.param("int8", "Qwen2", 1, {}, marks=VNNI),
        pytest.param("int8", "Qwen2", 4, {}, marks=VNNI),
        pytest.param("int8", "Llama", 2, SOME_IGNORED, marks=VNNI),
        ("fp8", "Mistral", 2, {}),
    ],
)
def test_weights_and_activations_of_eight_bits(make_folder, serving, tmp_path, layout, family, num_streams, ignored):
    """Where no number in the middle between two falls to another side, and moves what comes after it, they agree."""
    fused = {f"model.layers.1.{name}" for name in ignored}
    names = [f"model.layers.1.{name.split('.')[0]}.{part}" for name, parts in ignored.items() for part in parts]
    small, plain = quantized(make_folder(family, num_streams), tmp_path, layout, names)
    outputs, (unquantized, streams) = answers(serving, small, range(1, 9))
    assert unquantized == fused
    assert streams == ({torch.float32} if num_streams > 1 else set())
    model = dequantized(plain)
    weights_alone = expected(outputs, model)
    if layout == "int8":
        round_inputs(model, names, torch.round, 127)
    else:
        round_inputs(model, names, lambda x: x.to(torch.float8_e4m3fn).float(), 448)
    truth = expected(outputs, model)
    assert (served(outputs) - truth).abs().quantile(0.75) < 1e-5
    assert (weights_alone - truth).abs().quantile(0.25) > 1e-3


class TruncatedCache(DynamicCache):
    """As vLLM's of eight bits on CPUs, which cuts digits off."""

    scales = (1.0, 1.0)

    def update(self, keys, values, *args, **kwargs):
        small = (truncated(x / scale) * scale for x, scale in zip((keys, values), self.scales, strict=True))
        return super().update(*small, *args, **kwargs)


def truncated(x):
    nearest = x.to(torch.float8_e4m3fn)
    too_large = nearest.float().abs() > x.abs()
    return (nearest.view(torch.uint8) - too_large.to(torch.uint8)).view(torch.float8_e4m3fn).float()


class ScaledCache(TruncatedCache):
    scales = (0.5, 0.3)


@AVX512
@torch.no_grad()
@pytest.mark.parametrize("cache", [TruncatedCache, ScaledCache])
def test_a_cache_of_eight_bits(make_folder, serving, tmp_path, cache):
    """The prefix lies in the cache, and is cut off as the tokens' keys and values are."""
    folder, arguments = make_folder("Qwen2", 4), {"kv_cache_dtype": "fp8"}
    model = dequantized(folder)
    if cache is ScaledCache:
        folder, arguments = shutil.copytree(folder, tmp_path / "scaled"), {}
        scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
        settings = compressed("float-quantized", None) | {"config_groups": {}, "kv_cache_scheme": scheme}
        configure(folder, quantization_config=settings)
        tensors = load_file(folder / "model.safetensors")
        for layer in range(2):
            for name, scale in zip("kv", cache.scales, strict=True):
                tensors[f"model.layers.{layer}.self_attn.{name}_scale"] = torch.tensor([scale])
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    outputs, _ = answers(serving, folder, **arguments)
    for name, parameter in model.named_parameters():
        if "prefix" in name:
            scale = cache.scales["prefix_v" in name]
            parameter.copy_(truncated(parameter / scale) * scale)
    assert served(outputs).tolist() == pytest.approx(expected(outputs, model, cache).tolist(), abs=1e-4)


# -- A quantized backbone that transformers reads, and is wrapped


def read_and_wrapped(make_folder, fill, tmp_path):
    """A compressed backbone without streams, and a model of it with streams."""
    backbone, _ = quantized(make_folder("Qwen2", 1), tmp_path, "packed")
    configure(backbone, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
    model = AutoModelForCausalLM.from_pretrained(backbone, dtype=torch.float32).eval()
    parscale.wrap(model, 2, prefix_length=16, init="random")
    fill(model)
    return backbone, model


def test_a_compressed_model_is_saved_to_the_last_bit(make_folder, fill, tmp_path):
    """The folder holds the backbone's tensors to the last bit, and those of the streams."""
    backbone, model = read_and_wrapped(make_folder, fill, tmp_path)
    with torch.no_grad():
        logits = model(torch.tensor([[3, 4, 5]])).logits
    model.hf_quantizer.compressor.compress_model(model)
    model.save_pretrained(tmp_path / "full")
    saved, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "full", backbone))
    assert all(torch.equal(saved[name], tensor) for name, tensor in before.items())
    assert all("prefix" in name or "aggregate_layer" in name for name in saved.keys() - before.keys())
    again = dequantized(tmp_path / "full")
    with torch.no_grad():
        assert torch.equal(again(torch.tensor([[3, 4, 5]])).logits, logits)
    backbones, full = (json.loads((folder / "config.json").read_text()) for folder in (backbone, tmp_path / "full"))
    for field in ("format", "quantization_status", "ignore"):
        assert full["quantization_config"][field] == backbones["quantization_config"][field]


# -- What is refused


def refused(serving, folder, match, **arguments):
    with pytest.raises(ValueError, match=match), serving.engine(folder, **arguments):
        pass


def test_saved_decompressed(make_folder, serving, fill, tmp_path):
    """vLLM would take the decompressed weights for compressed ones."""
    _, model = read_and_wrapped(make_folder, fill, tmp_path)
    model.save_pretrained(tmp_path / "full")
    refused(serving, tmp_path / "full", r"compress_model\(model\) before save_pretrained", dtype="float16")


def test_a_scale_for_each_head(make_folder, serving, tmp_path):
    small, _ = quantized(make_folder("Qwen2", 4), tmp_path, "int8")
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "attn_head", "dynamic": False}
    configure(small, quantization_config=LAYOUTS["int8"][1] | {"kv_cache_scheme": scheme})
    refused(serving, small, "without a scale of the cache for each head")
