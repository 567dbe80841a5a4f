"""The public function: checks its arguments, then calls the chosen implementation."""

from __future__ import annotations

import functools

import torch

from parscale.kernels.aggregate.api import MAX_FUSED_STREAMS
from parscale.kernels.aggregator.reference import aggregator_reference
from parscale.kernels.dispatch import Impl, autocasts, runs_fused, wants_gradients
from parscale.kernels.shapes import shapes_error

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def aggregator(
    hidden: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    smoothing: float,
    *,
    impl: Impl = "auto",
) -> torch.Tensor:
    """`Linear(P*H -> H)`, SiLU, `Linear(H -> P)`, softmax over streams, smoothing, weighted sum.

    As in Chen et al., arXiv 2505.10475, section 3.2. The fused implementation computes the sum of the first projection,
    SiLU, softmax and mixture in float32, without rounding between them. Up to 32 rows it makes no reordered copy of
    `hidden`. The projections use the dtype of the weights, or autocast's, as linear layers do; the mixture uses that of
    `hidden`.

    Args:
        hidden: the streams' hidden states, `(P*B, S, H)`, stream-major rows.
        weight1: `(H, H*P)`, column `h*P + p` for hidden index h of stream p.
        bias1: `(H,)`.
        weight2: `(P, H)`.
        bias2: `(P,)`.
        smoothing: epsilon in `w * (1 - epsilon) + epsilon / P`, in [0, 1].
        impl: `"reference"` is plain torch. `"fused"` takes tensors of one dtype (float16, bfloat16 or float32), up to
            64 streams, and is differentiable once. `"auto"` is `"fused"` for such tensors on CUDA and ROCm devices
            where Triton is installed, and `"reference"` otherwise.

    Returns:
        `(B, S, H)` in the dtype of `hidden`.

    Raises:
        ValueError: shapes do not fit, there are no streams, `impl` is unknown, or `"fused"` cannot run.
    """
    tensors = (hidden, weight1, bias1, weight2, bias2)
    P, H = weight2.shape[0], hidden.shape[-1]
    expected = ((H, H * P), (H,), (P, H), (P,))
    if hidden.ndim != 3 or any(x.shape != shape for x, shape in zip(tensors[1:], expected, strict=True)):
        layouts = ("hidden (P*B, S, H)", "weight1 (H, H*P)", "bias1 (H,)", "weight2 (P, H)", "bias2 (P,)")
        raise shapes_error("aggregator", layouts, tensors)
    if P == 0:
        raise ValueError("aggregator mixes at least one stream, got P = 0.")
    if hidden.shape[0] % P:
        raise ValueError(f"hidden has {hidden.shape[0]} rows, which is not a multiple of the {P} streams.")
    weights = list(tensors[1:])
    if autocasts(hidden):
        weights = [x.to(torch.get_autocast_dtype(hidden.device.type)) for x in weights]
    if runs_fused(impl, hidden, functools.partial(_obstacle, hidden, weights, autocasts(hidden))):
        from parscale.kernels.aggregator.fused import aggregator_op

        x = hidden.unflatten(0, (P, -1)).flatten(1, 2)  # (P, B*S, H)
        out = aggregator_op(x, *weights, smoothing, wants_gradients(tensors))[0]
        return out.unflatten(0, (hidden.shape[0] // P, hidden.shape[1]))
    return aggregator_reference(*tensors, smoothing)


def _obstacle(hidden: torch.Tensor, weights: list[torch.Tensor], is_cast: bool) -> str | None:
    """Why the kernels cannot process these tensors; `None` if they can."""
    P = weights[-1].shape[0]
    if P > MAX_FUSED_STREAMS:
        return f"it takes 1 to {MAX_FUSED_STREAMS} streams, got {P}"
    dtypes = {x.dtype for x in weights} | (set() if is_cast else {hidden.dtype})
    if len(dtypes) > 1 or not {*dtypes, hidden.dtype} <= set(FLOATS):
        return f"it takes tensors of one dtype, float16, bfloat16 or float32, got {', '.join(map(str, dtypes))}"
    if len({x.device for x in (hidden, *weights)}) > 1:
        return "the tensors are on different devices"
    return None
