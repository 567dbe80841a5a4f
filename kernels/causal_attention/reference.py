"""Causal attention by one softmax over the joined keys, under an explicit mask."""

from __future__ import annotations

import torch
from torch import nn

from parscale.kernels.prefix import prepend


def causal_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    *,
    scaling: float | None = None,
) -> torch.Tensor:
    """`parscale.kernels.causal_attention` by one call with a mask: the baseline for the other implementations.

    Args:
        query: `(P*B, heads, S, D)`, stream-major rows.
        key: `(P*B, G, S, D)`.
        value: `(P*B, G, S, D)`.
        prefix_k: `(P, G, T, D)`.
        prefix_v: `(P, G, T, D)`.
        scaling: factor on the scores; `D ** -0.5` if `None`.

    Returns:
        `(P*B, heads, S, D)`.
    """
    T, S = prefix_k.shape[2], query.shape[2]
    visible = torch.ones(S, T + S, dtype=torch.bool, device=query.device).tril(T)
    return nn.functional.scaled_dot_product_attention(
        query,
        prepend(prefix_k, key),
        prepend(prefix_v, value),
        attn_mask=visible,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
