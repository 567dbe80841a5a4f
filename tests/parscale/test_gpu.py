"""Wrapped models on a GPU: the kernels inside them, captured graphs, and training."""

import copy

import pytest
import torch
from model_calls import given
from torch._dynamo.utils import counters
from transformers import StaticCache

import parscale

DEVICE = "cuda"
NAMES = ["llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt2", "mixtral", "deepseek_v3"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a GPU"),
]


def make(zoo, name="llama", dtype=torch.float32, impl="auto", num_streams=None, **changes):
    """A model on the GPU, and the same one in float64 on the CPU, by plain torch."""
    family = zoo.FAMILIES[name]
    model = family.build(family.attention[-1], dtype=dtype, **changes)
    parscale.wrap(model, num_streams or zoo.P, prefix_length=zoo.T, init="random", kernels=impl)
    zoo.fill_streams(model)
    exact = copy.deepcopy(model).double()
    exact.parscale.kernels = "reference"
    exact.config._experts_implementation = "eager"
    return model.to(DEVICE), exact


@torch.no_grad()
def along(model, ids, prompt=5):
    """Logits of a prompt and of one token after another."""
    cache, found = None, []
    for piece in ids.to(model.device).split([prompt] + [1] * (ids.shape[1] - prompt), dim=1):
        output = model(piece, use_cache=True, **given(model, cache))
        cache = output.past_key_values
        found.append(output.logits.double().cpu())
    return torch.cat(found, dim=1)


@pytest.mark.parametrize("name", NAMES)
def test_prefill_and_decoding_in_float32(name, zoo):
    model, exact = make(zoo, name)
    zoo.close(along(model, zoo.token_ids()), along(exact, zoo.token_ids()), 1e-3)  # a GPU's float32 products


@pytest.mark.parametrize("transform", ["prompt", "lora"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "mixtral"])
def test_other_transforms_in_float32(name, transform, zoo):
    family = zoo.FAMILIES[name]
    model = parscale.wrap(family.build("sdpa"), zoo.P, prefix_length=zoo.T, init="random", seed=0, transform=transform)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parscale.tensors(model.parscale.active).values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    exact = copy.deepcopy(model).double()
    exact.parscale.kernels = "reference"
    exact.config._experts_implementation = "eager"
    model.to(DEVICE)
    zoo.close(along(model, zoo.token_ids()), along(exact, zoo.token_ids()), 1e-3)
    assert model.generate(zoo.token_ids().to(DEVICE), max_new_tokens=3, pad_token_id=0).shape[0] == zoo.B


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gpt2"])
def test_half_precision_errs_as_plain_torch_does(name, dtype, zoo):
    ids, errors = zoo.token_ids(), {}
    for impl in ("auto", "reference"):
        model, exact = make(zoo, name, dtype, impl)
        errors[impl] = (along(model, ids) - along(exact, ids)).abs().mean().item()
    assert errors["auto"] <= 2 * errors["reference"], errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients(dtype, zoo):
    """Of every parameter, beside those of plain torch in the same precision."""
    found = {}
    for impl in ("auto", "reference"):
        model, exact = make(zoo, "llama", dtype, impl)
        for one in (model, exact):
            ids = zoo.token_ids().to(one.device)
            one.requires_grad_(True).train()(ids, labels=ids).loss.backward()
        exact = {name: p.grad for name, p in exact.named_parameters()}
        found[impl] = {name: (p.grad.double().cpu() - exact[name]).norm() for name, p in model.named_parameters()}
    norms = {name: gradient.norm() for name, gradient in exact.items()}
    for name, norm in norms.items():
        assert found["auto"][name] <= 2 * found["reference"][name] + 2 * torch.finfo(dtype).eps * norm, name


def test_a_training_step_compiles_as_one_graph(zoo):
    model, _ = make(zoo, "llama", torch.bfloat16)
    ids = zoo.token_ids().to(DEVICE)
    model.train()(ids, labels=ids).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    torch.compiler.reset()
    torch.compile(model, fullgraph=True)(ids, labels=ids).loss.backward()
    for name, gradient in expected.items():
        own = dict(model.named_parameters())[name].grad
        assert (own - gradient).norm() <= 0.25 * gradient.norm(), name  # bfloat16, through differences of streams


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_decoding_is_captured_in_graphs(name, zoo):
    """As `generate` compiles it with a static cache: nothing of it is left to Python."""
    model, _ = make(zoo, name, torch.bfloat16)
    ids = zoo.token_ids()
    cache = StaticCache(config=model.config, max_cache_len=16)
    torch.compiler.reset()
    counters.clear()
    step, found = torch.compile(model, fullgraph=True, mode="reduce-overhead"), []
    with torch.no_grad():
        found.append(model(ids[:, :5].to(DEVICE), **given(model, cache)).logits.double().cpu())
        for token in ids[:, 5:].to(DEVICE).split(1, dim=1):
            found.append(step(token, **given(model, cache)).logits.double().cpu())
    assert counters["inductor"]["cudagraph_skips"] == 0
    torch.testing.assert_close(torch.cat(found, dim=1), along(model, ids), rtol=0.1, atol=0.1)


@pytest.mark.parametrize("cache", [None, "static"])
def test_generate(cache, zoo):
    """The text that plain torch gives in float64 on the CPU, padding included."""
    model, exact = make(zoo)
    ids, padding = zoo.token_ids(), torch.tensor([[1] * zoo.S, [0] * 3 + [1] * (zoo.S - 3)])
    arguments = {"max_new_tokens": 7, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = exact.generate(ids * padding, attention_mask=padding, **arguments)
    inputs = {"input_ids": ids * padding, "attention_mask": padding}
    text = model.generate(**{k: v.to(DEVICE) for k, v in inputs.items()}, cache_implementation=cache, **arguments)
    assert torch.equal(text.cpu(), expected)
