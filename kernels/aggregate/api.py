"""The public function: validates, then calls the chosen implementation."""

from typing import Literal

import torch

from parscale.kernels.aggregate.reference import aggregate_reference


def aggregate(
    x: torch.Tensor,
    logits: torch.Tensor,
    smoothing: float,
    *,
    impl: Literal["auto", "reference"] = "auto",
) -> torch.Tensor:
    """Mixes P streams by a smoothed softmax.

    Args:
        x: hidden states of the streams, ``(P, N, H)``.
        logits: one row for each token, ``(N, P)``.
        smoothing: epsilon in ``w * (1 - epsilon) + epsilon / P``, in [0, 1].
        impl: ``"reference"`` is plain torch; ``"auto"`` picks the fastest implementation for the tensors' device.

    Returns:
        ``(N, H)`` in the dtype of ``x``.

    Raises:
        ValueError: shapes do not fit, or an unknown ``impl``.
    """
    if impl not in ("auto", "reference"):
        raise ValueError(f"impl must be 'auto' or 'reference', got {impl!r}.")
    if x.ndim != 3 or logits.ndim != 2 or logits.shape != (x.shape[1], x.shape[0]):
        raise ValueError(
            f"aggregate takes x (P, N, H) and logits (N, P), got {tuple(x.shape)} and {tuple(logits.shape)}."
        )
    return aggregate_reference(x, logits, smoothing)
