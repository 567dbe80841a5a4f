"""The public function: checks its arguments, then calls the chosen implementation."""

from __future__ import annotations

import functools

import torch

from parscale.kernels.aggregate.reference import aggregate_reference
from parscale.kernels.dispatch import Impl, runs_fused
from parscale.kernels.shapes import shapes_error

MAX_FUSED_STREAMS = 64
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def aggregate(
    x: torch.Tensor,
    logits: torch.Tensor,
    smoothing: float,
    *,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Mixes P streams by a smoothed softmax.

    Both implementations compute in float32 (float64 tensors in float64), and round once, at the end; where
    autocast is on, the reference in its dtype.

    Args:
        x: hidden states of the streams, `(P, N, H)`, any strides, of a floating-point dtype.
        logits: one row for each token, `(N, P)`, of a floating-point dtype.
        smoothing: epsilon in `w * (1 - epsilon) + epsilon / P`, in [0, 1].
        impl: `"reference"` is plain torch, differentiable any number of times. `"fused"` is one Triton kernel
            forward and one backward, differentiable once, for up to 64 streams. `"auto"` is `"fused"` on CUDA and
            ROCm devices where Triton is installed, and `"reference"` elsewhere and for more streams.

    Returns:
        `(N, H)` in the dtype of `x`.

    Raises:
        ValueError: shapes or dtypes do not fit, there are no streams, `smoothing` is out of range, `impl` is unknown,
            or `"fused"` cannot run.
    """
    if x.ndim != 3 or logits.ndim != 2 or logits.shape != (x.shape[1], x.shape[0]):
        raise shapes_error("aggregate", ("x (P, N, H)", "logits (N, P)"), (x, logits))
    if x.shape[0] == 0:
        raise ValueError("aggregate mixes at least one stream, got P = 0.")
    if not (x.is_floating_point() and logits.is_floating_point()):
        raise ValueError(f"aggregate takes floating-point tensors, got x {x.dtype} and logits {logits.dtype}.")
    if not 0 <= smoothing <= 1:  # NaN is not, either
        raise ValueError(f"smoothing must be between 0 and 1, got {smoothing}.")
    if runs_fused(impl, x, functools.partial(_obstacle, x, logits)):
        from parscale.kernels.aggregate.fused import aggregate_op

        return aggregate_op(x, logits, smoothing)
    return aggregate_reference(x, logits, smoothing)


def _obstacle(x: torch.Tensor, logits: torch.Tensor) -> str | None:
    """Why the kernels cannot process these tensors; `None` if they can."""
    if x.shape[0] > MAX_FUSED_STREAMS:
        return f"it takes 1 to {MAX_FUSED_STREAMS} streams, got {x.shape[0]}"
    if x.dtype not in FLOATS or logits.dtype not in FLOATS:
        return f"it takes float16, bfloat16, float32 or float64, got {x.dtype} and {logits.dtype}"
    if x.device != logits.device:
        return f"x is on {x.device} and the logits are on {logits.device}"
    return None
