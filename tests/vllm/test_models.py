"""vLLM's model of a checkpoint and its settings, without an engine: what they are made of, and need in the files."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import parscale

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0] * 16,
    "long_factor": [float(1 + i) for i in range(16)],
    "factor": 4.0,
}
IN_EIGHT_BITS = {"quantization": "fp8_per_channel", "dtype": "bfloat16"}


def test_slots_do_not_lengthen_the_text(tiny, serving, monkeypatch, tmp_path):
    """LongRoPE has two tables, and vLLM takes the second where the longest text is beyond the original length."""
    from vllm.model_executor.layers import rotary_embedding

    model = tiny("Llama", max_position_embeddings=512, rope_parameters=LONGROPE)
    parscale.wrap(model, 2, prefix_length=16).save_pretrained(tmp_path)
    monkeypatch.setattr(rotary_embedding, "_ROPE_DICT", {})  # one that another longest text has chosen
    with serving.built(tmp_path, max_model_len=128) as served:
        assert served.vllm_config.model_config.max_model_len == 128 + 16
        rotary = served.model.layers[0].self_attn.rotary_emb
        assert not rotary.use_long_rope
        positions, query, key = torch.arange(128), torch.randn(128, 4 * 32), torch.randn(128, 2 * 32)
        got = rotary(positions, query.clone(), key.clone())
    cos, sin = LlamaRotaryEmbedding(model.config)(query, positions[None])
    heads = [x.unflatten(1, (-1, 32)).transpose(0, 1)[None] for x in (query, key)]
    for x, expected in zip(got, apply_rotary_pos_emb(*heads, cos, sin), strict=True):
        torch.testing.assert_close(x, expected[0].transpose(0, 1).flatten(1))


MISSING = {
    "all of the aggregator": (lambda name: "aggregate_layer" in name, "aggregate_layer.0.bias", 4),
    "half of the aggregator": (lambda name: "aggregate_layer.0" in name, "aggregate_layer.0.bias", 2),
    "a layer's prefix": (lambda name: "layers.1.self_attn.prefix" in name, "layers.1.self_attn.prefix_k", 2),
}


@pytest.mark.grid
@pytest.mark.parametrize("is_missing", MISSING)
@pytest.mark.parametrize("kv", ["own", "shared"])
@pytest.mark.parametrize("arguments", [{}, IN_EIGHT_BITS], ids=["plain", "eight bits"])
def test_tensors_that_are_missing(make_folder, serving, tmp_path, is_missing, kv, arguments):
    """vLLM itself does not notice it in a quantized model, nor the aggregator's first projection in any."""
    dropped, first, number = MISSING[is_missing]
    folder = shutil.copytree(make_folder("Qwen2", 4, kv=kv), tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not dropped(name)}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    match = rf"damaged has no model\.{first} \({number} tensors of its streams are missing\): the checkpoint is damaged"
    with pytest.raises(ValueError, match=match), serving.built(folder, **arguments):
        pass


@pytest.mark.parametrize("kv", ["own", "shared"])
@pytest.mark.parametrize("arguments", [{}, IN_EIGHT_BITS], ids=["plain", "eight bits"])
def test_whole_folders(make_folder, serving, kv, arguments):
    """They load, and new tensors need not be all of them."""
    with serving.built(make_folder("Qwen2", 4, kv=kv), **arguments) as model:
        name = "model.layers.0.self_attn.prefix_k"
        new = torch.randn(3 + (kv == "own"), 2, 16, 32)
        assert model.load_weights([(name, new)]) == {name}
        assert torch.equal(model.get_parameter(name), new.to(model.get_parameter(name).dtype))


def test_a_further_set_without_an_aggregator(make_folder, serving, tmp_path):
    model = parscale.load(make_folder("Llama", 4))
    model.add_streams("other", 2, prefix_length=5, init="random")
    model.save_pretrained(tmp_path)
    chosen = {"hf_overrides": {"parscale_name": "other"}}
    with serving.built(tmp_path, **chosen) as served:
        assert served.model.num_streams == 2
    tensors = load_file(tmp_path / "other" / "streams.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "aggregate_layer" not in name}
    save_file(kept, tmp_path / "other" / "streams.safetensors")
    with pytest.raises(ValueError, match=r"has no model\.aggregate_layer\.0\.bias"), serving.built(tmp_path, **chosen):
        pass


@pytest.mark.parametrize("kv", ["own", "shared"])
def test_no_weights_are_needed_for_dummies(make_folder, serving, tmp_path, kv):
    """A trainer may send all of them, in any order and number."""
    shutil.copy(make_folder("Qwen2", 4, kv=kv) / "config.json", tmp_path)
    with serving.built(tmp_path, load_format="dummy") as model:
        name = "model.aggregate_layer.2.bias"
        model.load_weights([(name, torch.arange(4.0))])
        assert model.get_parameter(name).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("family", "fields"), [("Qwen2", {}), ("Mistral", {"sliding_window": 24})])
@pytest.mark.parametrize(
    ("is_v2", "arguments", "expected"),
    [
        (False, {}, ["OwnKeysProcessorV1"]),
        (False, {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, []),
        (True, {}, ["OwnKeysProcessorV2"]),
        (True, {"return_sampling_mask": True, "logprobs_mode": "processed_logprobs"}, []),
    ],
)
def test_what_refuses_one_stream(make_folder, serving, monkeypatch, family, fields, is_v2, arguments, expected):
    """A logits processor, where vLLM allows one; where not, the scheduler warns, which the slots need anyway."""
    from vllm import SamplingParams
    from vllm.v1.engine.input_processor import InputProcessor

    monkeypatch.setattr("vllm.config.vllm.HAS_TRITON", is_v2)  # by which vLLM decides
    config = serving.configured(make_folder(family, 4, **fields), **arguments)
    has_own_scheduler = config.scheduler_config.scheduler_cls is not None
    assert has_own_scheduler == (not expected or not fields)
    names = config.model_config.logits_processors or []
    assert [name.rpartition(":")[2] for name in names] == expected
    if expected:
        check = InputProcessor(config).validate_logits_processors_params
        check(SamplingParams())
        with pytest.raises(Exception, match="parscale_streams was 1"):
            check(SamplingParams(extra_args={"parscale_streams": 1}))


def tensors_of(value, seen):
    """Those that the plugin's own objects hold, by any path through them, modules and collections."""
    if isinstance(value, torch.Tensor):
        yield value
    elif id(value) not in seen:
        seen.add(id(value))
        inner = ()
        if isinstance(value, (list, tuple)):
            inner = value
        elif isinstance(value, dict):
            inner = value.values()
        elif isinstance(value, torch.nn.Module) or type(value).__module__.startswith("parscale."):
            inner = (
                each for name, each in vars(value).items() if not name.endswith("_cpu")
            )  # vLLM's, of its own layers
        for each in inner:
            yield from tensors_of(each, seen)


@pytest.mark.parametrize(
    ("family", "kv", "fields"),
    [("Qwen2", "own", {}), ("Mistral", "own", {"sliding_window": 24}), ("Qwen2", "shared", {})],
)
def test_sleep_loses_no_tensor(make_folder, serving, family, kv, fields):
    """At level 2 vLLM forgets all that was allocated with the model, and gives back the buffers; weights come anew."""
    with serving.built(make_folder(family, 2, kv=kv, **fields)) as model:
        kept = {tensor.data_ptr() for _, tensor in (*model.named_buffers(), *model.named_parameters())}
        found = [tensor for tensor in tensors_of(model, set()) if tensor.numel()]
        assert len(found) > 20
        assert {tensor.data_ptr() for tensor in found} <= kept
