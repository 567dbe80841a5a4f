"""The aggregator in plain torch: the baseline for the fused kernels."""

from __future__ import annotations

import torch
from torch import nn

from parscale.kernels.aggregate.api import aggregate
from parscale.kernels.aggregator.layout import stream_innermost


def aggregator_reference(
    hidden: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    smoothing: float,
) -> torch.Tensor:
    """As `parscale.kernels.aggregator`, with the copy into the order of `weight1`'s columns."""
    innermost = stream_innermost(hidden, weight2.shape[0])  # (B, S, H*P)
    inner = nn.functional.silu(nn.functional.linear(innermost.to(weight1.dtype), weight1, bias1))  # (B, S, H)
    logits = nn.functional.linear(inner, weight2, bias2)  # (B, S, P)
    x = innermost.view(-1, hidden.shape[-1], weight2.shape[0]).permute(2, 0, 1)  # (P, B*S, H)
    mixed = aggregate(x, logits.flatten(0, 1), smoothing, impl="reference")  # (B*S, H)
    return mixed.unflatten(0, logits.shape[:2])
