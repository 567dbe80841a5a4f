"""Attention over shared keys by one softmax over joined keys: the baseline for both operations on shared keys."""

from __future__ import annotations

import torch
from torch import nn

from parscale.kernels.shared_rows import plain_rows


def shared_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each query attends to its stream's whole prefix and to the keys that the mask shows it.

    Args:
        query: `(P*B, heads, S, D)`, stream-major rows, of all streams or of those with a prefix.
        key: `(B, G, K, D)`, of stream 0; `heads` is a multiple of G.
        value: `(B, G, K, Dv)`.
        prefix_k: `(P - 1, G, T, D)`, of streams 1 to P - 1.
        prefix_v: `(P - 1, G, T, Dv)`.
        mask: boolean (True: attend), broadcasting to `(B, heads, S, K)`; `None`: each token sees those up to and
            including itself, aligned to the last of the K keys.

    Returns:
        `(P*B, heads, S, Dv)`.
    """
    B, S, K, T = key.shape[0], query.shape[2], key.shape[2], prefix_k.shape[2]
    if mask is None:
        mask = torch.ones(1, 1, S, K, dtype=torch.bool, device=query.device).tril(K - S)
    outputs, plain = [], plain_rows(query, key, prefix_k)
    for index, rows in enumerate(query.split(B)):
        keys, values, visible = key, value, mask
        if index * B >= plain:
            own = [prefix[index - plain // B].expand(B, -1, -1, -1) for prefix in (prefix_k, prefix_v)]
            keys, values = torch.cat([own[0], key], dim=2), torch.cat([own[1], value], dim=2)
            visible = nn.functional.pad(mask, (T, 0), value=True)
        outputs.append(
            nn.functional.scaled_dot_product_attention(
                rows, keys, values, attn_mask=visible, enable_gqa=query.shape[1] != key.shape[1]
            )
        )
    return torch.cat(outputs)
