"""Decode attention over shared keys in plain torch: prefixes and cache are read in place, their scores are joined."""

from __future__ import annotations

import functools

import torch

from parscale.kernels.dispatch import runs_without_autocast
from parscale.kernels.pieces import split_tokens, tokens_of_piece


@runs_without_autocast
def shared_decode_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    mask: torch.Tensor | None,
    plain: int,
    scaling: float | None,
) -> torch.Tensor:
    """`parscale.kernels.shared_decode_attention` without `length`; `plain` is from `plain_rows`."""
    (R, heads, _, D), (B, G, _, _), (Q, _, T, Dv) = query.shape, key.shape, prefix_v.shape
    P, n = R // B, heads // G
    dtype = torch.promote_types(query.dtype, torch.float32)
    piece = None if key.dtype == dtype else tokens_of_piece(key)
    scaled = (query.to(dtype) * (D**-0.5 if scaling is None else scaling)).view(P, B, G, n, D)
    by_stream = scaled[P - Q :].transpose(1, 2).reshape(Q * G, B * n, D)
    of_prefix = torch.bmm(by_stream, prefix_k.to(dtype).flatten(0, 1).mT)  # (Q*G, B*n, T)
    of_prefix = of_prefix.view(Q, G, B, n, T).permute(2, 1, 0, 3, 4)  # (B, G, Q, n, T)
    if plain:  # stream 0 has no prefix
        of_prefix = torch.cat([of_prefix.new_full((B, G, 1, n, T), -torch.inf), of_prefix], dim=2)
    grouped = scaled.permute(1, 2, 0, 3, 4).reshape(B * G, P * n, D)  # all queries of a key/value head
    of_pieces = split_tokens(key, piece, 2)
    parts = [torch.bmm(grouped, keys.to(dtype).flatten(0, 1).mT) for keys in of_pieces]  # each (B*G, P*n, K)
    of_cache = (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)).view(B, G, P, n, -1)
    if mask is not None:
        mask = mask.unflatten(1, (1, 1) if mask.shape[1] == 1 else (G, n))  # (B or 1, G or 1, n or 1, 1, K)
        mask = mask.permute(0, 1, 3, 2, 4)  # (B or 1, G or 1, 1, n or 1, K)
        hidden = torch.finfo(of_cache.dtype).min
        of_cache = of_cache.masked_fill(~mask, hidden) if mask.dtype == torch.bool else of_cache + mask
    weights = torch.softmax(torch.cat([of_prefix, of_cache], dim=-1), dim=-1, dtype=dtype)  # (B, G, P, n, T + K)

    by_stream = weights[:, :, P - Q :, :, :T].permute(2, 1, 0, 3, 4).reshape(Q * G, B * n, T)
    over_prefix = torch.bmm(by_stream, prefix_v.to(dtype).flatten(0, 1))  # (Q*G, B*n, Dv)
    over_prefix = over_prefix.view(Q, G, B, n, Dv).transpose(1, 2)  # (Q, B, G, n, Dv)
    grouped = weights[..., T:].view(B * G, P * n, -1)
    products = zip(split_tokens(grouped, piece, -1), split_tokens(value, piece, 2), strict=True)
    over_cache = (torch.bmm(part, values.to(dtype).flatten(0, 1)) for part, values in products)  # each (B*G, P*n, Dv)
    output = functools.reduce(torch.add, over_cache).view(B, G, P, n, Dv).permute(2, 0, 1, 3, 4)  # (P, B, G, n, Dv)
    with_prefix = output[P - Q :] + over_prefix
    output = torch.cat([output[: P - Q], with_prefix]) if plain else with_prefix
    return output.reshape(R, heads, 1, Dv).to(query.dtype)
