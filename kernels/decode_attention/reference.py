"""Decode attention in plain torch: prefix and cache are read in place; only their scores are joined."""

from __future__ import annotations

import torch

from parscale.kernels.dispatch import runs_without_autocast
from parscale.kernels.pieces import split_tokens, tokens_of_piece


@runs_without_autocast
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
    """`parscale.kernels.decode_attention` without `length`, `sinks` and `softcap`.

    Half-precision tensors are multiplied in float32: scores rounded to half precision, such as those of keys with a
    large bias, would give errors of some percent after the softmax.
    """
    (R, heads, _, D), (P, G, T, _), K = query.shape, prefix_k.shape, key.shape[2]
    B, n = R // P, heads // G
    scaling = D**-0.5 if scaling is None else scaling
    dtype = torch.promote_types(query.dtype, torch.float32)
    piece = None if key.dtype == dtype else tokens_of_piece(key)
    grouped = (query.to(dtype) * scaling).reshape(R * G, n, D)  # the queries of a key/value head as its rows
    of_prefix = torch.bmm(_by_stream(grouped, P, B, G), prefix_k.to(dtype).flatten(0, 1).mT)  # (P*G, B*n, T)
    scores = [_by_row(of_prefix, P, B, G)]
    of_pieces = split_tokens(key, piece, 2)
    scores += [torch.bmm(grouped, keys.to(dtype).flatten(0, 1).mT) for keys in of_pieces]  # each (R*G, n, K)
    if mask is not None:
        if mask.shape[1] != 1:
            mask = mask.expand(R, heads, 1, -1).reshape(R, G, n, -1)
        if mask.shape[-1] == K:
            seen = split_tokens(mask, piece, -1)
            scores[1:] = [_masked(*pair, G) for pair in zip(scores[1:], seen, strict=True)]
    joined = torch.cat(scores, dim=-1)  # (R*G, n, T + K)
    if mask is not None and mask.shape[-1] != K:
        joined = _masked(joined, mask, G)
    weights = torch.softmax(joined, dim=-1, dtype=dtype)

    of_prefix = torch.bmm(_by_stream(weights[..., :T], P, B, G), prefix_v.to(dtype).flatten(0, 1))  # (P*G, B*n, Dv)
    output = _by_row(of_prefix, P, B, G)  # (R*G, n, Dv)
    products = zip(split_tokens(weights[..., T:], piece, -1), split_tokens(value, piece, 2), strict=True)
    for part, values in products:
        output = output + torch.bmm(part, values.to(dtype).flatten(0, 1))
    return output.view(R, heads, 1, -1).to(query.dtype)


def _by_stream(x: torch.Tensor, P: int, B: int, G: int) -> torch.Tensor:
    """`(P*B*G, n, N)` as `(P*G, B*n, N)`: all rows of a stream meet the same prefix."""
    return x if B == 1 else x.reshape(P, B, G, *x.shape[1:]).transpose(1, 2).reshape(P * G, -1, x.shape[-1])


def _by_row(x: torch.Tensor, P: int, B: int, G: int) -> torch.Tensor:
    """`(P*G, B*n, N)` as `(P*B*G, n, N)`."""
    return x if B == 1 else x.view(P, G, B, -1, x.shape[-1]).transpose(1, 2).reshape(P * B * G, -1, x.shape[-1])


def _masked(scores: torch.Tensor, mask: torch.Tensor, G: int) -> torch.Tensor:
    """Scores `(R*G, n, N)` under a mask that broadcasts to `(R, G, n, N)`."""
    by_head = scores.unflatten(0, (-1, G))
    if mask.dtype == torch.bool:
        return by_head.masked_fill(~mask, torch.finfo(scores.dtype).min).flatten(0, 1)
    return (by_head + mask).flatten(0, 1)
