"""Tests of Triton kernels run on a GPU, or in a process where Triton interprets (see `test_interpreted.py`)."""

import os

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
