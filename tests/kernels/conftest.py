"""Tests of Triton kernels run on a GPU, or in a process where Triton interprets (see `test_interpreted.py`)."""

import os
from types import SimpleNamespace

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    """Tests of kernels need a device, unless they are being interpreted."""
    for item in items:
        if item.get_closest_marker("kernel") is None or INTERPRETED:
            continue
        item.add_marker(pytest.mark.gpu)
        item.add_marker(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, or the interpreter"))


@pytest.fixture
def device():
    return "cpu" if INTERPRETED else "cuda"


@pytest.fixture
def poisoned(monkeypatch):
    """What a kernel does not write is NaN."""
    empty = torch.empty

    def poison(*args, **kwargs):
        found = empty(*args, **kwargs)
        return found.fill_(float("nan")) if found.is_floating_point() else found

    monkeypatch.setattr(torch, "empty", poison)


@pytest.fixture
def guarded():
    """Copies tensors of floats into the middle of longer buffers of NaN: what is read beside them spoils a result."""

    def guard(x):
        if x is None or not x.is_floating_point():
            return x
        room = 4096
        buffer = torch.full((x.numel() + 2 * room,), float("nan"), dtype=x.dtype, device=x.device)
        inside = buffer[room : room + x.numel()].view(x.shape)
        return inside.copy_(x)

    return guard


@pytest.fixture
def assert_as_exact():
    """A kernel's results err at most twice as much as the reference's in the same precision, and one rounding.

    Of fewer than 64 numbers, too small a sample to tell two from three, four times as much. The one rounding is for
    references that are exact by chance; float32 results, where a sum's order decides, get four, and float64 ones, whose
    reference is the standard itself, eight. The interpreter truncates what it stores in bfloat16, which errs by up to
    two roundings to nearest.
    """

    def check(fused, reference, exact):
        assert fused.dtype == reference.dtype
        assert fused.shape == reference.shape == exact.shape
        if exact.numel() == 0:
            return
        roundings = {torch.float32: 4, torch.float64: 8}.get(fused.dtype, 1)
        fused, reference, unit = fused.double().cpu(), reference.double().cpu(), torch.finfo(fused.dtype).eps
        exact = exact.cpu()
        assert fused.isfinite().all()
        norm = exact.square().mean().sqrt()
        own, allowed = ((x - exact).square().mean().sqrt() for x in (fused, reference))
        factor = 2 if exact.numel() >= 64 else 4
        assert own <= factor * allowed + roundings * unit * norm + torch.finfo(torch.float64).tiny, (
            f"{own:.3g} against {allowed:.3g}"
        )

    return check


class Elsewhere(torch.Tensor):
    """On a CPU, but does not say so."""

    is_cpu = False


@pytest.fixture
def operators():
    """Stands in for the GPU's flash attention, through torch's dispatcher and under its schemas.

    Its causal mask is aligned to the lower right, and its gradients are those of the output and log-sum-exp that it is
    given. `calls` are noted, and `elsewhere(f)` is f on tensors that do not say that they are on a CPU.
    """
    calls = []

    def scores(query, key, causal, factor):
        S, K = query.shape[2], key.shape[2]
        visible = torch.ones(S, K, dtype=torch.bool).tril(K - S if causal else K)
        return (query @ key.mT * factor).masked_fill(~visible, -torch.inf)

    def plain(*tensors):
        """Without the subclass, and each key/value head for all of its queries."""
        heads = tensors[0].shape[1]
        tensors = [x.as_subclass(torch.Tensor) for x in tensors]
        assert all(x.stride(-1) == 1 or x.shape[-1] == 1 for x in tensors)
        return [x.repeat_interleave(heads // x.shape[1], 1) for x in tensors]

    def forward(query, key, value, dropout=0.0, causal=False, debug=False, *, scale=None):
        calls.append(("forward", tuple(query.shape), tuple(key.shape), dropout, causal))
        sizes, empty = (query.shape[2], key.shape[2]), torch.empty(0)
        query, key, value = plain(query, key, value)
        found = scores(query, key, causal, query.shape[-1] ** -0.5 if scale is None else scale)
        return found.softmax(-1) @ value, found.logsumexp(-1), empty, empty, *sizes, empty, empty, empty

    def backward(gradient, query, key, value, output, lse, cum_q, cum_k, max_q, max_k, dropout, causal, *_, scale=None):
        calls.append(("backward", tuple(query.shape), tuple(key.shape), dropout, causal))
        assert (max_q, max_k) == (query.shape[2], key.shape[2])
        assert lse.is_contiguous()
        G, factor = key.shape[1], query.shape[-1] ** -0.5 if scale is None else scale
        query, key, value, gradient, output = plain(query, key, value, gradient, output)
        probabilities = (scores(query, key, causal, factor) - lse.as_subclass(torch.Tensor)[..., None]).exp()
        d_scores = probabilities * (gradient @ value.mT - (gradient * output).sum(-1, keepdim=True)) * factor
        by_group = (d_scores.mT @ query, probabilities.mT @ gradient)
        return d_scores @ key, *(x.unflatten(1, (G, -1)).sum(2) for x in by_group)

    def elsewhere(function):
        def call(*tensors, **options):
            return function(*(x.as_subclass(Elsewhere) for x in tensors), **options).as_subclass(torch.Tensor)

        return call

    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_flash_attention", forward, "CPU")
    library.impl("_scaled_dot_product_flash_attention_backward", backward, "CPU")
    yield SimpleNamespace(calls=calls, elsewhere=elsewhere)
    library._destroy()
