"""Decode attention in plain torch: prefix and cache are read in place; only their scores are joined."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# Half-precision keys and values are converted to single precision in pieces of this many elements, which stay in the
# cache of a processor and in the pool of its allocator.
PIECE = 2**20


def decode_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
) -> torch.Tensor:
    """Softmax attention of one token per row over `[prefix of stream p | cache]`.

    Half-precision tensors are multiplied in float32: scores rounded to half precision, such as those of keys with a
    large bias, would give errors of some percent after the softmax.

    Args:
        query: `(P*B, heads, 1, D)`, stream-major rows.
        key: `(P*B, G, K, D)`; `heads` is a multiple of G (grouped queries).
        value: `(P*B, G, K, Dv)`.
        prefix_k: `(P, G, T, D)`, shared by the B rows of each stream.
        prefix_v: `(P, G, T, Dv)`.
        mask: `None`, or boolean (True: attend) or additive, broadcasting to `(P*B, heads, 1, T + K)`, or with `K` in
            place of `T + K`, for the cache alone.
        scaling: factor on the scores; `D ** -0.5` if `None`.

    Returns:
        `(P*B, heads, 1, Dv)` in the dtype of `query`.
    """
    (R, heads, _, D), (P, G, T, _), K = query.shape, prefix_k.shape, key.shape[2]
    B, n = R // P, heads // G
    scaling = D**-0.5 if scaling is None else scaling
    dtype = torch.promote_types(query.dtype, torch.float32)
    piece = None
    if key.dtype != dtype and not torch.compiler.is_compiling():
        piece = max(1, PIECE // (R * G * D))

    def pieces(states: torch.Tensor, dim: int) -> Sequence[torch.Tensor]:
        return (states,) if piece is None else states.split(piece, dim)

    grouped = (query.to(dtype) * scaling).view(R, G, n, D)  # the queries of a key/value head as its rows
    by_stream = grouped.unflatten(0, (P, B)).transpose(1, 2).reshape(P, G, B * n, D)  # (P, B, G, n, D) -> ...
    scores = torch.matmul(by_stream, prefix_k.to(dtype).transpose(-1, -2))  # (P, G, B*n, T)
    parts = [scores.unflatten(2, (B, n)).transpose(1, 2).reshape(R, G, n, T)]
    cached = [torch.matmul(grouped, keys.to(dtype).transpose(-1, -2)) for keys in pieces(key, 2)]
    if mask is not None:
        mask = mask.expand(R, heads, 1, -1).reshape(R, G, n, -1) if mask.shape[1] != 1 else mask
        if mask.shape[-1] == K:
            cached = [_masked(part, seen) for part, seen in zip(cached, pieces(mask, -1), strict=True)]
    scores = torch.cat(parts + cached, dim=-1)  # (R, G, n, T + K)
    if mask is not None and mask.shape[-1] != K:
        scores = _masked(scores, mask)
    weights = torch.softmax(scores, dim=-1, dtype=dtype)

    by_stream = weights[..., :T].unflatten(0, (P, B)).transpose(1, 2).reshape(P, G, B * n, T)
    output = torch.matmul(by_stream, prefix_v.to(dtype))  # (P, G, B*n, Dv)
    output = output.unflatten(2, (B, n)).transpose(1, 2).reshape(R, G, n, -1)
    for part, values in zip(pieces(weights[..., T:], -1), pieces(value, 2), strict=True):
        output = output + torch.matmul(part, values.to(dtype))
    return output.view(R, heads, 1, -1).to(query.dtype)


def _masked(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    if mask.dtype == torch.bool:
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores + mask
