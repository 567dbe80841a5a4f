"""The fused kernels inside wrapped models: with the masks, strides and caches that transformers hands over."""

import pytest
import torch
import transformers
from small_models import SMALL

import parscale

LATENT = {"q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6}
EXPERTS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {"num_key_value_heads": 1},
    "DeepseekV3": LATENT | EXPERTS | {"num_key_value_heads": 4, "first_k_dense_replace": 1},
}
P, T = 3, 5


def make(name, device, kv="own"):
    """The same model twice: by the fused kernels, and by plain torch."""
    config = getattr(transformers, f"{name}Config")(**SMALL | MODELS[name], attn_implementation="sdpa")
    models = []
    for kernels in ("fused", "reference"):
        torch.manual_seed(0)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0, 0.3)
        parscale.wrap(model, P, prefix_length=T, init="random", kernels=kernels, kv=kv)
        for parameter_name, parameter in model.named_parameters():
            if "prefix_" in parameter_name or "aggregate_layer" in parameter_name:
                torch.nn.init.normal_(parameter, 0, 1 if "prefix_" in parameter_name else 0.3)
        models.append(model.to(device))
    return models


@pytest.mark.grid
@pytest.mark.kernel
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize(
    ("name", "kv"),
    [
        ("Llama", "own"),
        ("Mistral", "own"),
        ("Llama", "shared"),
        *(pytest.param(name, "own", marks=pytest.mark.nightly) for name in MODELS if name not in ("Llama", "Mistral")),
    ],
)
@torch.no_grad()
def test_texts_and_scores(name, kv, cache, device):
    """Of two prompts, one of them padded on the left."""
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1)).to(device)
    padding = torch.ones_like(ids)
    padding[1, :4] = 0
    arguments = {"attention_mask": padding, "max_new_tokens": 2, "do_sample": False, "pad_token_id": 0}
    arguments |= {"output_logits": True, "return_dict_in_generate": True, "cache_implementation": cache}
    fused, plain = (model.generate(ids * padding, **arguments) for model in make(name, device, kv))
    assert torch.equal(fused.sequences, plain.sequences)
    tolerance = 1e-4 if device == "cpu" else 1e-2  # a GPU's float32 products
    for own, other in zip(fused.logits, plain.logits, strict=True):
        assert (own - other).abs().max() <= tolerance * other.abs().max()


@pytest.mark.kernel
def test_gradients(device):
    """Through the aggregator's kernels."""
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1)).to(device)
    fused, plain = make("Llama", device)
    for model in (fused, plain):
        model.train()(ids, labels=ids).loss.backward()
    trained = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert any("aggregate_layer" in name for name in trained)
    for name, gradient in trained.items():
        own = fused.get_parameter(name).grad
        assert (own - gradient).norm() <= (1e-4 if device == "cpu" else 1e-2) * gradient.norm(), name


def test_without_triton(programs, tmp_path):
    """Everything runs by plain torch, and what asks for a kernel hears why there is none."""
    code = """
import sys
sys.modules["triton"] = None
import torch, transformers, parscale
from parscale.kernels import aggregate, aggregator
from parscale.kernels import decode_attention

config = transformers.LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
)
model = parscale.wrap(transformers.LlamaForCausalLM(config), 2, prefix_length=3, init="random")
ids = torch.ones(1, 5, dtype=int)
model(ids, labels=ids).loss.backward()
assert model.eval().generate(ids, max_new_tokens=3, min_new_tokens=3).shape == (1, 8)
x, logits = torch.randn(2, 3, 4), torch.randn(3, 2)
assert torch.equal(aggregate(x, logits, 0.1), aggregate(x, logits, 0.1, impl="reference"))
states = [torch.ones(2, 1, n, 4) for n in (1, 6, 6, 3, 3)]
for operation in (
    lambda: aggregate(torch.ones(2, 3, 4), torch.ones(3, 2), 0.1, impl="fused"),
    lambda: aggregator(
        torch.ones(2, 3, 4), torch.ones(4, 8), torch.ones(4), torch.ones(2, 4), torch.ones(2), 0.1, impl="fused"
    ),
    lambda: decode_attention(*states, None, impl="fused"),
):
    try:
        operation()
    except ValueError as error:
        assert "Triton is not installed" in str(error), error
    else:
        raise AssertionError("no error")
"""
    result = programs.run("-P", "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
