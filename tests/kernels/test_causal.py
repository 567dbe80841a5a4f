"""Causal attention by torch's flash attention: merged from two runs on a CPU, and as it is called on a GPU."""

import importlib
from types import SimpleNamespace

import pytest
import torch
from scripts import load_script
from torch._subclasses import FakeTensorMode

from parscale.kernels import causal_attention, causal_attention_reference, flash_supports
from parscale.kernels.causal_attention.api import _flash_runs

aten = torch.ops.aten
square_attention = load_script("gpu_bench").square_attention
HALVES = [torch.bfloat16, torch.float16]
NAMES = ["query", "key", "value", "prefix_k", "prefix_v"]


def inputs(P=2, B=3, heads=4, G=2, S=5, T=3, D=8, dtype=torch.float64, device="cpu", joined=False):
    """As attention layers make them, `(R, S, heads, D)` transposed; with `joined`, slices of one projection."""
    generator = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(device, dtype)

    # keys with a bias, as Qwen2's, whose scores are large and nearly alike
    bias = 5 * draw(1, G, 1, D)
    if joined:
        states = list(draw(P * B, S, heads + 2 * G, D).transpose(1, 2).split([heads, G, G], dim=1))
    else:
        states = [draw(P * B, S, n, D).transpose(1, 2) for n in (heads, G, G)]
    states[1].add_(bias)
    return [*states, draw(P, G, T, D) + bias, draw(P, G, T, D)]


def gradients(function, tensors):
    own = [x.detach().requires_grad_() for x in tensors]
    output = function(*own, scaling=0.3)
    gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output, *torch.autograd.grad(output, own, gradient.to(output))]


@pytest.mark.parametrize("joined", [False, True], ids=["apart", "of one projection"])
@pytest.mark.parametrize("size", [{}, {"B": 1}, {"P": 1}, {"S": 1}, {"T": 1}, {"G": 4}, {"S": 70, "T": 48}], ids=str)
def test_output_and_gradients(size, joined):
    tensors = inputs(**size, joined=joined)
    expected = gradients(causal_attention_reference, tensors)
    for name, own, other in zip(["output", *NAMES], gradients(causal_attention, tensors), expected, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("dtype", "is_sink"),
    [(torch.float32, False), *((dtype, is_sink) for dtype in HALVES for is_sink in (False, True))],
    ids=str,
)
def test_is_as_exact_as_torch(dtype, is_sink):
    """Mean errors against float64, beside those of torch's attention over the joined keys in the same precision.

    A sink takes almost all weight and has no values, so that the output is what is left to the tokens.
    """
    tensors = inputs(P=2, B=2, S=40, T=16, D=32, dtype=dtype)
    if is_sink:
        query, _, value, prefix_k, prefix_v = tensors
        for x, more in ((query, 1), (value, 4), (prefix_k, 0.5)):
            x.add_(more)
        prefix_v.zero_()
    exact = gradients(causal_attention_reference, [x.double() for x in tensors])
    own, theirs = gradients(causal_attention, tensors), gradients(causal_attention_reference, tensors)
    for name, a, b, truth in zip(["output", *NAMES], own, theirs, exact, strict=True):
        assert a.dtype == dtype
        errors = [(x.double() - truth).abs().mean().item() for x in (a, b)]
        assert errors[0] <= 2 * errors[1], (name, errors)


def test_under_compile(monkeypatch):
    """In one graph, with the question to the device that a GPU's tensors raise."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=9))

    def asks_first(query, key, value, *prefix, scaling):
        assert flash_supports(query, key, value)
        assert _flash_runs(query.device)
        return causal_attention(query, key, value, *prefix, scaling=scaling)

    torch.compiler.reset()
    compiled = torch.compile(asks_first, fullgraph=True, backend="aot_eager")
    for own, other in zip(gradients(compiled, inputs()), gradients(causal_attention, inputs()), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)


# -- the operator of a GPU, whose causal mask is aligned to the lower right


def test_by_the_operators_of_a_gpu(operators):
    elsewhere = operators.elsewhere(causal_attention)
    for own, other in zip(gradients(elsewhere, inputs()), gradients(causal_attention, inputs()), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)
    expected = [(way, (6, 4, 5, 8), (6, 2, 8, 8), 0.0, True) for way in ("forward", "backward")]
    assert operators.calls == expected


def test_rocm_gets_square_masks(operators, monkeypatch):
    """Its operator aligns the mask to one corner or the other, by its version, and some refuse gradients of others."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    elsewhere = operators.elsewhere(causal_attention)
    for own, other in zip(gradients(elsewhere, inputs()), gradients(causal_attention, inputs()), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-12)
    expected = [(way, (6, 4, 8, 8), (6, 2, 8, 8), 0.0, True) for way in ("forward", "backward")]
    assert operators.calls == expected


def test_torchs_own_lower_right_mask_calls_the_same_operator(operators, monkeypatch):
    """So the alignment that is relied on is the one that torch relies on itself."""
    bias = importlib.import_module("torch.nn.attention.bias")
    monkeypatch.setattr(bias, "can_use_flash_attention", lambda params: True)
    query, key, value, *_ = inputs(G=4, T=0, S=5)
    bias.CausalBias._dispatch(query[:, :, :3], key, value, bias.causal_lower_right(3, 5))
    assert [(name, *others) for name, _, _, *others in operators.calls] == [("forward", 0.0, True)]


def test_shapes_by_torchs_own_description_of_the_operators():
    """Their implementation for tensors without data: the call binds, and grouped keys keep their shape."""
    tensors = [x.requires_grad_() for x in inputs(dtype=torch.bfloat16, device="meta")]
    output = causal_attention(*tensors)
    assert output.shape == tensors[0].shape
    output.backward(torch.empty_like(output))
    assert [x.grad.shape for x in tensors] == [x.shape for x in tensors]
    assert {x.grad.dtype for x in tensors} == {torch.bfloat16}


def test_which_tensors_it_takes(monkeypatch):
    def supported(major=9, allowed=True, built=True, D=64, value_size=None, impl="auto", autocast=None, **options):
        dtype, device = options.get("dtype", torch.bfloat16), options.get("device", "cuda")
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(major=major))
        monkeypatch.setattr(torch.backends.cuda, "flash_sdp_enabled", lambda: allowed)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: autocast is not None)
        monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: autocast)
        with FakeTensorMode():
            query, value = (torch.empty(2, 2, 3, size, dtype=dtype, device=device) for size in (D, value_size or D))
            return flash_supports(query, query, value, impl)

    assert supported()
    assert supported(dtype=torch.float16, D=256)
    assert supported(device="cpu", dtype=torch.float64, D=7)
    assert not supported(impl="reference")
    assert not supported(impl="reference", device="cpu")
    assert not supported(value_size=32)  # latent attention
    assert not supported(dtype=torch.float32)
    assert supported(dtype=torch.float32, autocast=torch.bfloat16)
    assert not supported(D=20)
    assert not supported(D=264)
    assert not supported(major=7)
    assert not supported(built=False)  # torch for Windows
    assert supported(built=False, device="cpu")
    assert not supported(allowed=False)
    assert not supported(allowed=False, device="cpu")
    assert not supported(device="meta")


def test_leaves_transforms_to_torchs_own():
    """They differentiate any number of times, forward and backward."""
    supported = []
    query, key, value, *_ = inputs()
    torch.func.grad(lambda x: (supported.append(flash_supports(x, key, value)), x.sum())[1])(query)
    torch.func.vmap(lambda x: (supported.append(flash_supports(x[None], key, value)), x)[1])(query)
    assert supported == [False, False]
    assert flash_supports(query, key, value)


def test_the_baseline_is_the_same_attention():
    for own, other in zip(
        *(gradients(each, inputs()) for each in (square_attention, causal_attention_reference)), strict=True
    ):
        torch.testing.assert_close(own, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_errors_in_half_precision(dtype):
    """As on a GPU below, on this machine's flash attention."""
    errors_beside_those_of_the_baseline(inputs(P=4, B=1, S=300, T=48, D=64, dtype=dtype))


def errors_beside_those_of_the_baseline(tensors):
    """Mean errors against float64, of the output and each gradient, beside those of torch's flash attention."""
    exact = gradients(causal_attention_reference, [x.cpu().double() for x in tensors])
    own, theirs = gradients(causal_attention, tensors), gradients(square_attention, tensors)
    for name, a, b, truth in zip(["output", *NAMES], own, theirs, exact, strict=True):
        errors = [(x.double().cpu() - truth).abs().mean().item() for x in (a, b)]
        assert errors[0] <= 2 * errors[1], (name, errors)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "size", [{"B": 1}, {"B": 2, "G": 4}, {"B": 2, "G": 1, "S": 129}, {"T": 200, "D": 128}], ids=str
)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_on_a_gpu(dtype, size):
    tensors = [x.cuda() for x in inputs(**{"P": 4, "S": 300, "T": 48, "D": 64, "dtype": dtype} | size)]
    assert flash_supports(*tensors[:3])
    errors_beside_those_of_the_baseline(tensors)
