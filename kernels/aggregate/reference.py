"""The weighted sum over streams in plain torch: the baseline for the fused kernel."""

import torch


def aggregate_reference(x: torch.Tensor, logits: torch.Tensor, smoothing: float) -> torch.Tensor:
    """Softmax over streams, smoothing, weighted sum (Chen et al., arXiv 2505.10475, section 3.2).

    Computes in float32 (float64 inputs stay float64) and rounds once, at the end; under autocast, in its dtype, which
    halves what is kept for the backward pass.

    Args:
        x: hidden states of the streams, `(P, N, H)`.
        logits: `(N, P)`.
        smoothing: epsilon in `w * (1 - epsilon) + epsilon / P`.

    Returns:
        `(N, H)` in the dtype of `x`.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    weights = stream_weights(logits, smoothing, dtype)  # (N, P)
    mixed = torch.bmm(x.to(dtype).permute(1, 2, 0), weights.unsqueeze(-1))  # (N, H, P) by (N, P, 1)
    return mixed.squeeze(-1).to(x.dtype)


def stream_weights(logits: torch.Tensor, smoothing: float, dtype: torch.dtype | None = None) -> torch.Tensor:
    """The smoothed aggregation weights.

    Args:
        logits: `(..., P)`.
        smoothing: epsilon in `w * (1 - epsilon) + epsilon / P`.
        dtype: of the softmax; by default that of `logits`, and at least float32.

    Returns:
        `(..., P)`, which sum to 1.
    """
    weights = torch.softmax(logits, dim=-1, dtype=dtype or torch.promote_types(logits.dtype, torch.float32))
    return weights * (1 - smoothing) + smoothing / logits.shape[-1]
