"""Low-rank differences of streams that share keys and values: on every linear layer but those of keys and values."""

import math

import pytest
import torch
import transformers
from model_calls import given
from torch.nn.functional import scaled_dot_product_attention

import parscale

TOLERANCE = 2e-5
NAMES = ["llama", "gpt2", "phi3", "mistral", "deepseek_v3"]


def plain(zoo, name):
    family = zoo.FAMILIES[name]
    return zoo.Case(family, family.attention[-1]).plain(**family.all_experts)


def share(zoo, model, num_streams=3):
    """With differences that are as large as what they are added to."""
    zoo.share(model, num_streams, transform="lora", rank=3)
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("stream_up"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def reference(zoo, name, model, ids):
    """An unwrapped model of P*B rows: all attend to the first stream's keys, each adds its own differences."""
    backbone, B = plain(zoo, name), ids.shape[0]
    P = model.num_streams
    tensors = dict(model.named_parameters())

    def attend(module, query, key, value, mask, scaling=None, **kwargs):
        keys, values = (x[:B].repeat(P, 1, 1, 1) for x in (key, value))
        return scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scaling, enable_gqa=True
        ).transpose(1, 2), None

    def add(down, up):
        def hook(module, args, output):
            x = args[0].reshape(P, -1, args[0].shape[-1])
            more = torch.stack([x[p] @ down[p - 1].T @ up[p - 1].T for p in range(1, P)])
            return output + torch.cat([torch.zeros_like(more[:1]), more]).reshape(output.shape)

        return hook

    transformers.AttentionInterface.register("first_keys", attend)
    backbone.config._attn_implementation = "first_keys"
    for path, module in backbone.named_modules():
        if f"{path}.stream_down" in tensors:
            module.register_forward_hook(add(tensors[f"{path}.stream_down"], tensors[f"{path}.stream_up"]))
    hidden = backbone.get_decoder()(input_ids=ids.repeat(P, 1), use_cache=False)[0]
    return backbone.lm_head(model.get_decoder().aggregate_layer(hidden))


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_against_each_stream_by_hand(name, zoo):
    model, ids = share(zoo, plain(zoo, name)), zoo.token_ids(length=5)  # within any window
    expected = reference(zoo, name, model, ids)
    zoo.close(model(ids).logits, expected, TOLERANCE)
    zoo.close(model(ids, logits_to_keep=2).logits, expected[:, -2:], TOLERANCE)
    output = model(ids[:, :3], use_cache=True)
    for at in (3, 4):
        output = model(ids[:, at : at + 1], **given(model, output.past_key_values))
        zoo.close(output.logits, expected[:, at : at + 1], TOLERANCE)
    assert output.past_key_values.layers[0].keys.shape[0] == zoo.B


def test_stream_0_and_projections_of_keys_have_none(zoo):
    model = share(zoo, plain(zoo, "llama"), 4)
    downs = {name: p for name, p in model.named_parameters() if name.endswith("stream_down")}
    assert {name.split(".")[-2] for name in downs} == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all(p.shape[:2] == (3, 3) for p in downs.values())


@pytest.mark.parametrize("kv", ["own", "shared"])
def test_how_far_from_zero_low_rank_streams_begin(kv, zoo):
    """Up to one over the root of the number of inputs, as a layer of so many begins."""
    model = parscale.wrap(plain(zoo, "llama"), 2, transform="lora", kv=kv, rank=4, seed=0)
    for name, down in model.named_parameters():
        if name.endswith("stream_down"):
            bound = down.shape[-1] ** -0.5
            assert 0.8 * bound < down.abs().max() <= bound, name


def test_low_rank_streams_of_a_higher_precision_than_the_backbone(zoo):
    model, ids = share(zoo, plain(zoo, "llama").bfloat16()), zoo.token_ids()
    with torch.no_grad():
        expected = model(ids).logits
        for tensor in model.stream_parameters():
            tensor.data = tensor.data.float()
        logits = model(ids).logits
    assert logits.dtype == torch.bfloat16
    zoo.close(logits, expected, 2**-4 * expected.abs().max().item())


@torch.no_grad()
def test_shared_low_rank_streams_start_as_the_backbone_with_its_cache(zoo):
    backbone, ids = plain(zoo, "llama"), zoo.token_ids()
    model = parscale.wrap(plain(zoo, "llama"), 3, transform="lora", kv="shared", smoothing=0.0, seed=0)
    zoo.close(model(ids).logits, backbone(ids).logits, TOLERANCE)
    share(zoo, parscale.unwrap(model))
    caches = [each(ids, logits_to_keep=1, use_cache=True).past_key_values for each in (model, backbone)]
    for mine, theirs in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(mine.keys, theirs.keys)
        assert torch.equal(mine.values, theirs.values)


@torch.no_grad()
def test_infinity_is_the_backbone_and_zero_all_streams(zoo):
    model, ids = share(zoo, plain(zoo, "llama")), zoo.token_ids()
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(model.generate(ids, adaptive=math.inf, **options), plain(zoo, "llama").generate(ids, **options))
    assert torch.equal(model.generate(ids, adaptive=0, **options), model.generate(ids, **options))
    whole = model.generate(ids, **options, use_cache=False)
    assert torch.equal(model.generate(ids, **options), whole)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_folders_come_back_bit_for_bit(name, zoo, tmp_path):
    model, ids = share(zoo, plain(zoo, name)), zoo.token_ids()
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "full")
    model.save_streams(tmp_path / "streams")
    for loaded in (
        parscale.load(tmp_path / "full"),
        parscale.load(tmp_path / "streams", backbone=plain(zoo, name)),
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "full"),
    ):
        assert loaded.config.parscale_kv == "shared"
        assert torch.equal(loaded(ids).logits, expected)


def test_a_damaged_number_of_streams_is_named(zoo, tmp_path):
    from safetensors.torch import load_file, save_file

    model = share(zoo, plain(zoo, "llama"))
    model.save_streams(tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("stream_up"))
    tensors[name] = tensors[name][:1].contiguous()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=rf"{name} of .* but its configuration says \(2, outputs, 3\)"):
        parscale.load(tmp_path, backbone=plain(zoo, "llama"))


def test_every_difference_learns(zoo):
    model = share(zoo, plain(zoo, "llama"))
    model.freeze_backbone()
    model(zoo.token_ids(), labels=zoo.token_ids()).loss.backward()
    streams = [p for name, p in model.named_parameters() if "stream_" in name or "aggregate" in name]
    assert all(p.grad is not None and all(rows.any() for rows in p.grad.reshape(len(p), -1)) for p in streams)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
