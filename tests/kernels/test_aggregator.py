"""`aggregator`: the Triton kernels against float64, forward and every gradient, in both regimes."""

import pytest
import torch

from parscale.kernels import aggregator

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
# (P, B, S, H), dtype: up to 32 rows one way, more another
SIZES = [
    ((1, 1, 1, 1), SINGLE),
    ((2, 1, 1, 32), SINGLE),  # one row
    ((3, 2, 5, 20), SINGLE),
    ((4, 1, 7, 33), BRAIN),
    ((8, 1, 1, 65), BRAIN),
    ((5, 4, 8, 24), HALF),  # the most of the few
    ((16, 1, 3, 17), SINGLE),
    ((2, 0, 5, 16), SINGLE),  # none
    ((4, 11, 3, 16), BRAIN),  # the fewest of the many
    ((3, 2, 40, 50), HALF),
    ((8, 3, 21, 64), BRAIN),
    ((12, 2, 20, 33), SINGLE),
    pytest.param((7, 1, 70, 130), HALF, marks=pytest.mark.nightly),
    pytest.param((2, 3, 50, 137), SINGLE, marks=pytest.mark.nightly),
]


def inputs(P, B, S, H, dtype, device):
    generator = torch.Generator().manual_seed(P * 1000 + B * S * 100 + H)
    sizes = [
        ((P * B, S, H), 1.0),
        ((H, H * P), (H * P) ** -0.5),
        ((H,), 1.0),
        ((P, H), H**-0.5),
        ((P,), 1.0),
        ((B, S, H), 1.0),
    ]
    drawn = [torch.randn(*size, generator=generator, dtype=torch.float64) * scale for size, scale in sizes]
    return [x.to(dtype).to(device) for x in drawn]


def run(impl, tensors, gradient, dtype=None):
    tensors = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    out = aggregator(*tensors, 0.1, impl=impl)
    return out.detach(), *torch.autograd.grad(out, tensors, gradient.to(out.dtype))


def compare(check, *tensors, gradient):
    exact = run("reference", tensors, gradient, dtype=torch.float64)
    for results in zip(run("fused", tensors, gradient), run("reference", tensors, gradient), exact, strict=True):
        check(*results)


@pytest.mark.kernel
@pytest.mark.parametrize(("size", "dtype"), SIZES, ids=str)
def test_against_float64(size, dtype, device, poisoned, assert_as_exact):
    *tensors, gradient = inputs(*size, dtype, device)
    compare(assert_as_exact, *tensors, gradient=gradient)


@pytest.mark.kernel
@pytest.mark.parametrize("S", [pytest.param(3, marks=pytest.mark.nightly), 17])
def test_the_result_is_the_same_without_gradients(S, device, poisoned):
    *tensors, _ = inputs(3, 2, S, 24, SINGLE, device)
    with torch.no_grad():
        found = aggregator(*tensors, 0.1, impl="fused")
    assert torch.equal(found, aggregator(*(x.requires_grad_() for x in tensors), 0.1, impl="fused"))


@pytest.mark.kernel
@pytest.mark.parametrize("S", [3, pytest.param(17, marks=pytest.mark.nightly)])
def test_under_autocast(S, device, poisoned):
    """The projections in half precision, the mixture in that of the hidden states, gradients in the parameters' own."""
    *tensors, gradient = inputs(4, 2, S, 32, SINGLE, device)
    exact = run("reference", tensors, gradient, dtype=torch.float64)
    with torch.autocast(device, BRAIN):
        found = run("fused", tensors, gradient)
    for own, truth in zip(found, exact, strict=True):
        assert own.dtype == SINGLE
        # a rounding of weights and factors, 2**-8 each at most, of sums in which they cancel
        assert (own.double().cpu() - truth.cpu()).norm() <= 2**-6 * truth.norm()


@pytest.mark.kernel
@pytest.mark.parametrize("S", [3, 33])
def test_strides(S, device, poisoned, assert_as_exact):
    """Hidden states that lie transposed, cut out of longer rows, and weights that are a view."""
    *tensors, gradient = inputs(3, 1, S, 24, SINGLE, device)
    tensors[0] = torch.randn(3, 48, S, generator=torch.Generator().manual_seed(0)).to(device).transpose(1, 2)[..., 4:28]
    tensors[1] = tensors[1].T.contiguous().T
    tensors[3] = tensors[3].T.contiguous().T
    compare(assert_as_exact, *tensors, gradient=gradient[:1, :1].expand_as(gradient))


@pytest.mark.kernel
@pytest.mark.parametrize("S", [3, 33])
def test_large_activations(S, device, poisoned, assert_as_exact):
    """SiLU far from zero, on both sides, and logits of which one rules."""
    *tensors, gradient = inputs(3, 1, S, 24, SINGLE, device)
    tensors[2] = tensors[2] * 200
    compare(assert_as_exact, *tensors, gradient=gradient)


@pytest.mark.kernel
@pytest.mark.parametrize("size", [(4, 1, 3, 48), (3, 1, 5, 20), (4, 1, 40, 33)], ids=str)
def test_nothing_beside_the_tensors_is_read(size, device, guarded):
    *tensors, gradient = inputs(*size, SINGLE, device)
    kept = [guarded(x) for x in tensors]
    for own, clean in zip(run("fused", kept, guarded(gradient)), run("fused", tensors, gradient), strict=True):
        assert own.isfinite().all()
        assert torch.equal(own, clean)


@pytest.mark.kernel
def test_both_regimes_agree(device, monkeypatch):
    """The kernel that reads the weights where they lie, and cuBLAS on rearranged rows."""
    from parscale.kernels.aggregator import fused

    *tensors, _ = inputs(4, 1, 20, 48, SINGLE, device)
    own = fused.forward(*tensors, 0.1, True)
    monkeypatch.setattr(fused, "FEW_ROWS", 0)
    for one, other in zip(own, fused.forward(*tensors, 0.1, True), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.kernel
@pytest.mark.parametrize("S", [3, pytest.param(17, marks=pytest.mark.nightly)])
def test_compiles_in_one_graph(S, device):
    *tensors, gradient = inputs(3, 2, S, 24, SINGLE, device)
    tensors = [x.requires_grad_() for x in tensors]
    compiled = torch.compile(lambda *x: aggregator(*x, 0.1, impl="fused") * 2, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(aggregator(*tensors, 0.1, impl="fused") * 2, tensors, gradient)
    found = torch.autograd.grad(compiled(*tensors), tensors, gradient)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.kernel
def test_is_differentiable_once(device):
    *tensors, _ = inputs(3, 2, 4, 10, SINGLE, device)
    tensors = [x.requires_grad_() for x in tensors]
    first = torch.autograd.grad(aggregator(*tensors, 0.1, impl="fused").square().sum(), tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(sum(x.square().sum() for x in first), tensors)


@pytest.mark.kernel
def test_operators_are_registered_properly(device):
    x, *weights, gradient = inputs(3, 1, 4, 10, SINGLE, device)
    operators = torch.ops.parscale
    tensors = [t.requires_grad_() for t in (x, *weights)]
    torch.library.opcheck(operators.aggregator.default, (*tensors, 0.1, True))
    x, w1, _, w2, _ = (t.detach() for t in tensors)
    logits = torch.randn(4, 3, device=device)
    torch.library.opcheck(operators.aggregator_backward.default, (gradient[0], x, w1, w2, gradient[0], logits, 0.1))


@pytest.mark.kernel
def test_vmap(device):
    *tensors, _ = inputs(3, 2, 4, 10, SINGLE, device)
    hidden = torch.stack([tensors[0], -tensors[0]])
    found = torch.vmap(lambda x: aggregator(x, *tensors[1:], 0.1, impl="fused"))(hidden)
    for i in range(2):
        torch.testing.assert_close(found[i], aggregator(hidden[i], *tensors[1:], 0.1, impl="reference"))


def test_reference_is_the_models_own():
    from parscale.streams.aggregator import Aggregator

    *tensors, _ = inputs(3, 2, 5, 16, SINGLE, "cpu")
    layer = Aggregator(3, 16, 0.1, dtype=SINGLE, device="cpu")
    layer.load_state_dict(dict(zip(("0.weight", "0.bias", "2.weight", "2.bias"), tensors[1:], strict=True)))
    assert torch.equal(aggregator(*tensors, 0.1), layer(tensors[0]))


@pytest.mark.parametrize(
    ("change", "impl", "message"),
    [
        ({}, "fast", "impl must be 'auto', 'fused' or 'reference', got 'fast'"),
        ({1: (16, 47)}, "auto", r"weight1 \(H, H\*P\).*got \(6, 5, 16\), \(16, 47\)"),
        ({0: (5, 5, 16)}, "auto", "hidden has 5 rows, which is not a multiple of the 3 streams"),
        ({1: (16, 0), 3: (0, 16), 4: (0,)}, "auto", "at least one stream, got P = 0"),
    ],
)
def test_what_does_not_fit_is_named(change, impl, message):
    sizes = [(6, 5, 16), (16, 48), (16,), (3, 16), (3,)]
    with pytest.raises(ValueError, match=message):
        aggregator(*(torch.zeros(change.get(i, size)) for i, size in enumerate(sizes)), 0.1, impl=impl)


def test_fused_says_why_it_cannot():
    *tensors, _ = inputs(3, 2, 5, 16, SINGLE, "cpu")
    with pytest.raises(ValueError, match=r"one dtype, float16, bfloat16 or float32, got torch\.float64"):
        aggregator(*(x.double() for x in tensors), 0.1, impl="fused")
    with pytest.raises(ValueError, match=r"one dtype.*torch\.bfloat16"):
        aggregator(tensors[0].to(BRAIN), *tensors[1:], 0.1, impl="fused")


def test_weights_wider_than_the_hidden_states():
    """Without `"fused"`, which takes one dtype: the projections in that of the weights, the result in the other."""
    *tensors, _ = inputs(3, 2, 5, 16, SINGLE, "cpu")
    hidden = tensors[0].to(BRAIN)
    exact = aggregator(hidden.double(), *(x.double() for x in tensors[1:]), 0.1, impl="reference")
    for impl in ("auto", "reference"):
        mixed = aggregator(hidden, *tensors[1:], 0.1, impl=impl)
        assert mixed.dtype == BRAIN
        assert ((mixed.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()
