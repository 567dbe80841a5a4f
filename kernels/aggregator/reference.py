"""The aggregator in plain torch: the baseline for the fused kernels."""

from __future__ import annotations

import torch
from torch import nn

from parscale.kernels.aggregate.api import aggregate


def aggregator_reference(
    hidden: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    smoothing: float,
) -> torch.Tensor:
    """`parscale.kernels.aggregator`, with a copy of `hidden` in the order of `weight1`'s columns."""
    x = hidden.unflatten(0, (weight2.shape[0], -1))  # (P, B, S, H)
    joined = x.permute(1, 2, 3, 0).flatten(2)  # (B, S, H, P) -> (B, S, H*P)
    inner = nn.functional.silu(nn.functional.linear(joined, weight1, bias1))  # (B, S, H)
    logits = nn.functional.linear(inner, weight2, bias2)  # (B, S, P)
    mixed = aggregate(x.flatten(1, 2), logits.flatten(0, 1), smoothing, impl="reference")  # (B*S, H)
    return mixed.unflatten(0, logits.shape[:2])
