"""`aggregate`: the Triton kernels against float64, forward and every gradient; and which implementation runs."""

import pytest
import torch

from parscale.kernels import aggregate

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# (P, N, H)
SIZES = [
    (1, 1, 1),
    (1, 4, 48),
    (2, 3, 5),
    (3, 15, 65),
    (4, 1, 1000),  # one row
    (5, 0, 7),  # none
    (2, 3, 0),
    (6, 7, 130),
    (7, 2, 513),
    (8, 33, 96),
    (9, 5, 31),
    (12, 3, 257),
    (16, 17, 64),
    (64, 2, 33),
]


def inputs(P, N, H, dtype, device, scale=2.0):
    generator = torch.Generator().manual_seed(P * 1000 + N * 100 + H)
    x, logits, gradient = (
        torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype).to(device)
        for size in ((P, N, H), (N, P), (N, H))
    )
    return x, logits * scale, gradient


def run(impl, x, logits, gradient, smoothing=0.1, dtype=None):
    x, logits, gradient = (t.detach().to(dtype or t.dtype) for t in (x, logits, gradient))
    x.requires_grad_()
    logits.requires_grad_()
    out = aggregate(x, logits, smoothing, impl=impl)
    return out.detach(), *torch.autograd.grad(out, (x, logits), gradient)


def compare(check, *tensors, smoothing=0.1):
    fused = run("fused", *tensors, smoothing)
    reference = run("reference", *tensors, smoothing)
    exact = run("reference", *tensors, smoothing, dtype=torch.float64)
    for results in zip(fused, reference, exact, strict=True):
        check(*results)


@pytest.mark.grid
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_against_float64(size, dtype, device, poisoned, assert_as_exact):
    compare(assert_as_exact, *inputs(*size, dtype, device))


@pytest.mark.kernel
@pytest.mark.parametrize("size", [(3, 15, 65), (7, 2, 513), (5, 1, 1)], ids=str)
def test_nothing_beside_the_tensors_is_read(size, device, guarded):
    tensors = inputs(*size, torch.float32, device)
    for own, clean in zip(run("fused", *map(guarded, tensors)), run("fused", *tensors), strict=True):
        assert own.isfinite().all()
        assert torch.equal(own, clean)


@pytest.mark.kernel
@pytest.mark.parametrize("smoothing", [0.0, 0.01, 1.0])
def test_smoothing(smoothing, device, poisoned, assert_as_exact):
    compare(assert_as_exact, *inputs(3, 5, 17, torch.float32, device), smoothing=smoothing)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_extreme_logits(dtype, device, poisoned, assert_as_exact):
    x, logits, gradient = inputs(4, 6, 33, dtype, device)
    largest = torch.finfo(dtype).max
    logits[0] = largest
    logits[1] = -largest
    logits[2, 1] = largest
    logits[3, :3] = float("-inf")
    logits[4] = torch.tensor([1e4, -1e4, 1e4, 0.0])
    compare(assert_as_exact, x, logits, gradient)


@pytest.mark.kernel
def test_not_a_number_stays_in_its_row(device):
    x, logits, _ = inputs(3, 4, 9, torch.float32, device)
    logits[1, 2], logits[2, 0] = float("nan"), float("inf")
    rows = aggregate(x, logits, 0.1, impl="fused").isnan().all(1)
    assert torch.equal(rows, aggregate(x, logits, 0.1, impl="reference").isnan().all(1))
    assert rows.tolist() == [False, True, True, False]


@pytest.mark.kernel
def test_strides(device, poisoned, assert_as_exact):
    """Streams innermost, every second row, reversed roles of rows and columns, a gradient of one number."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(10, 33, 3, generator=generator).to(device).permute(2, 0, 1)[:, ::2]  # (3, 5, 33)
    logits = torch.randn(3, 10, generator=generator).to(device).T[::2]  # (5, 3)
    gradient = torch.ones((), device=device).expand(5, 33)
    compare(assert_as_exact, x, logits, gradient)
    x = torch.randn(3, 33, 5, generator=generator).to(device).transpose(1, 2)
    compare(assert_as_exact, x, logits, torch.randn(33, 5, generator=generator).to(device).T)
    shared = torch.randn(5, 33, generator=generator).to(device).expand(3, 5, 33)
    assert_as_exact(
        *(aggregate(*t, 0.1, impl=i) for i, *t in (("fused", shared, logits), ("reference", shared, logits))),
        aggregate(shared.double(), logits.double(), 0.1, impl="reference"),
    )


@pytest.mark.kernel
def test_dtypes_may_differ(device, assert_as_exact):
    x, logits, gradient = inputs(4, 6, 33, torch.float16, device)
    compare(assert_as_exact, x, logits.float(), gradient)
    x, logits, gradient = inputs(4, 6, 33, torch.float32, device)
    compare(assert_as_exact, x, logits.half(), gradient)


@pytest.mark.kernel
def test_compiles_in_one_graph(device):
    x, logits, gradient = (t.requires_grad_() for t in inputs(3, 5, 17, torch.float32, device))
    compiled = torch.compile(
        lambda x, logits: aggregate(x, logits, 0.1, impl="fused") * 2, fullgraph=True, backend="aot_eager"
    )
    expected = torch.autograd.grad(aggregate(x, logits, 0.1, impl="fused") * 2, (x, logits), gradient)
    found = torch.autograd.grad(compiled(x, logits), (x, logits), gradient)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.kernel
def test_is_differentiable_once(device):
    x, logits, _ = (t.requires_grad_() for t in inputs(3, 5, 17, torch.float32, device))
    mixed = aggregate(x, logits, 0.1, impl="fused")
    first = torch.autograd.grad(mixed.square().sum(), (x, logits), create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        torch.autograd.grad(sum(t.square().sum() for t in first), (x, logits))


@pytest.mark.kernel
def test_operators_are_registered_properly(device):
    x, logits, gradient = inputs(3, 5, 17, torch.float32, device)
    operators = torch.ops.parscale
    torch.library.opcheck(operators.aggregate.default, (x.requires_grad_(), logits.requires_grad_(), 0.1))
    torch.library.opcheck(operators.aggregate_backward.default, (gradient, x.detach(), logits.detach(), 0.1))


@pytest.mark.kernel
@pytest.mark.parametrize("dims", [(0, None), (None, 1), (2, 2)])
def test_vmap(dims, device):
    xs = [inputs(3, 4, 9 + i, torch.float32, device)[0][..., :9] for i in range(2)]
    rows = [inputs(3, 4, 9 + i, torch.float32, device)[1] for i in range(2)]
    mapped = [each[0] if dim is None else torch.stack(each, dim) for each, dim in ((xs, dims[0]), (rows, dims[1]))]
    for impl in ("fused", "reference"):
        found = torch.vmap(lambda x, logits, impl=impl: aggregate(x, logits, 0.1, impl=impl), dims)(*mapped)
        for i in range(2):
            x, logits = (each[0] if dim is None else each[i] for each, dim in ((xs, dims[0]), (rows, dims[1])))
            torch.testing.assert_close(found[i], aggregate(x, logits, 0.1, impl="reference"))


@pytest.mark.kernel
def test_capture_as_a_graph(device):
    if device == "cpu":
        x, logits, _ = inputs(3, 4, 9, torch.float32, device)
        aggregate(x, logits, 0.1, impl="fused")  # there are no graphs; the call alone
        return
    x, logits, _ = inputs(3, 4, 9, torch.float32, device)
    expected = aggregate(x, logits, 0.1, impl="fused")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = aggregate(x, logits, 0.1, impl="fused")
    found.zero_()
    graph.replay()
    assert torch.equal(found, expected)


def test_automatic_choice_on_a_cpu_is_the_reference():
    x, logits, _ = inputs(3, 4, 9, torch.float32, "cpu")
    assert torch.equal(aggregate(x, logits, 0.1), aggregate(x, logits, 0.1, impl="reference"))


@pytest.mark.parametrize(
    ("x", "logits", "impl", "message"),
    [
        ((3, 4, 9), (4, 3), "fast", "impl must be 'auto', 'fused' or 'reference', got 'fast'"),
        ((3, 4, 9), (3, 4), "auto", r"x \(P, N, H\) and logits \(N, P\), got \(3, 4, 9\) and \(3, 4\)"),
        ((65, 1, 2), (1, 65), "fused", "1 to 64 streams, got 65.*impl='auto'"),
    ],
)
def test_what_does_not_fit_is_named(x, logits, impl, message):
    with pytest.raises(ValueError, match=message):
        aggregate(torch.zeros(x), torch.zeros(logits), 0.1, impl=impl)


@pytest.mark.parametrize(
    ("x", "logits", "smoothing", "message"),
    [
        (torch.zeros(0, 4, 9), torch.zeros(4, 0), 0.1, "at least one stream, got P = 0"),
        (torch.ones(3, 4, 9, dtype=torch.long), torch.zeros(4, 3), 0.1, r"floating-point tensors, got x torch\.int64"),
        (torch.zeros(3, 4, 9), torch.zeros(4, 3, dtype=torch.cfloat), 0.1, r"logits torch\.complex64"),
        (torch.zeros(3, 4, 9), torch.zeros(4, 3), -0.1, r"smoothing must be between 0 and 1, got -0\.1"),
        (torch.zeros(3, 4, 9), torch.zeros(4, 3), 1.5, r"smoothing must be between 0 and 1, got 1\.5"),
        (torch.zeros(3, 4, 9), torch.zeros(4, 3), float("nan"), "smoothing must be between 0 and 1, got nan"),
    ],
)
def test_values_that_have_no_mixture_are_named(x, logits, smoothing, message):
    """A mean of integers would be cut to integers, and of nothing there is none."""
    with pytest.raises(ValueError, match=message):
        aggregate(x, logits, smoothing)


def test_fused_does_not_fall_back_in_silence(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="the tensors are on cpu, but the kernels need a CUDA or ROCm device"):
        aggregate(torch.zeros(2, 3, 4), torch.zeros(3, 2), 0.1, impl="fused")
