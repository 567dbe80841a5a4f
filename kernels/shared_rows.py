"""Grouped-query attention over shared keys: the queries of all streams become queries of the same key/value heads.

To attention over shared keys, P streams of `heads` queries are one row of `P * heads` queries. The queries of a
key/value head must be adjacent, so head `(g, i)` of stream p becomes head `(g, p, i)`.
"""

from __future__ import annotations

import torch


def fold_queries(x: torch.Tensor, B: int, G: int) -> torch.Tensor:
    """`(P*B, heads, S, D)`, stream-major, as `(B, P*heads, S, D)`, grouped by key/value head."""
    x = x.transpose(1, 2).unflatten(0, (-1, B)).unflatten(3, (G, -1))  # (P, B, S, G, n, D)
    return x.permute(1, 2, 3, 0, 4, 5).flatten(2, 4).transpose(1, 2)  # over (B, S, G, P, n, D)


def unfold_queries(x: torch.Tensor, P: int, G: int) -> torch.Tensor:
    """`(B, P*heads, S, D)` as `(P*B, heads, S, D)`: the inverse of `fold_queries`."""
    x = x.transpose(1, 2).unflatten(2, (G, P, -1))  # (B, S, G, P, n, D)
    return x.permute(3, 0, 1, 2, 4, 5).flatten(3, 4).flatten(0, 1).transpose(1, 2)  # over (P, B, S, G, n, D)


def plain_rows(query: torch.Tensor, key: torch.Tensor, prefix_k: torch.Tensor) -> int:
    """The number of leading rows without a prefix: B if stream 0 is among the streams, otherwise 0.

    Raises:
        ValueError: shapes do not fit together.
    """
    rows, B, streams = query.shape[0], key.shape[0], prefix_k.shape[0]
    plain = rows - streams * B
    if plain not in (0, B):
        raise ValueError(
            f"Attention over shared keys takes queries of {streams} or {streams + 1} streams of {B} rows (prefix_k is "
            f"{tuple(prefix_k.shape)}, key {tuple(key.shape)}), got query {tuple(query.shape)}."
        )
    return plain
