"""Decode attention over shared keys: one token of each stream; the cache is read once for all streams.

The streams are more queries of a key/value head. On a CPU, without a mask and gradients and in full precision, torch's
flash attention reads the cache in one call and the prefixes in a second one, and the two are merged by their
log-sum-exp. Elsewhere in plain torch, prefixes and cache are read in place too, and their scores are joined. The fused
implementation is the one for streams with their own keys (`parscale.kernels.decode_attention`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from parscale.kernels.causal_attention.api import HALVES, is_mergeable
from parscale.kernels.decode_attention.api import decode_obstacle, decode_shapes_error, is_one_token
from parscale.kernels.decode_attention.reference import PIECE
from parscale.kernels.dispatch import Impl, runs_fused
from parscale.kernels.flash import flash, wants_gradients
from parscale.kernels.shared_attention.layout import plain_rows

MOST_QUERIES = 64  # of all streams on one key/value head, for a program of the fused implementation


def fits_fused(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether the fused implementation supports this number of queries for one key/value head."""
    return query.shape[0] * query.shape[1] <= MOST_QUERIES * key.shape[0] * key.shape[1]


def shared_decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    length: torch.Tensor | None = None,
    scaling: float | None = None,
    impl: Impl = "auto",
) -> torch.Tensor:
    """Softmax attention of one token of each stream over `[prefix of stream p | cache of stream 0]`.

    In plain torch, half-precision tensors are multiplied in float32: scores rounded to half precision, such as those of
    keys with a large bias, would give errors of some percent after the softmax.

    Args:
        query: `(P*B, heads, 1, D)`, stream-major rows, of all streams or of those with a prefix.
        key: `(B, G, K, D)`; `heads` is a multiple of G (grouped queries).
        value: `(B, G, K, Dv)`.
        prefix_k: `(P - 1, G, T, D)`, of streams 1 to P - 1.
        prefix_v: `(P - 1, G, T, Dv)`.
        mask: `None`, or over the cache: boolean (True: attend) or additive, broadcasting to `(B, heads, 1, K)`.
        length: number of real tokens among the K, `(B,)` or one, on the device.
        scaling: factor on the scores; `D ** -0.5` if `None`.
        impl: as in `parscale.kernels.decode_attention`; `"fused"` supports up to 64 queries of all streams for each
            key/value head.

    Returns:
        `(P*B, heads, 1, Dv)` in the dtype of `query`.

    Raises:
        ValueError: shapes do not fit together, `impl` is unknown, or `"fused"` cannot run.
    """
    tensors = (query, key, value, prefix_k, prefix_v)
    if not is_one_token(tensors):
        raise decode_shapes_error("shared_decode_attention", "B", "P - 1", tensors)
    plain = plain_rows(query, key, prefix_k)
    if runs_fused(impl, query, functools.partial(_obstacle, tensors, (mask, length))):
        from parscale.kernels.decode_attention.fused import decode_op

        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        return decode_op(*tensors, mask, length, None, factor, None)
    if length is not None:
        real = torch.arange(key.shape[2], device=key.device) < length.view(-1, 1, 1, 1)  # (B or 1, 1, 1, K)
        if mask is None or mask.dtype == torch.bool:
            mask = real if mask is None else mask & real
        else:
            mask = mask.masked_fill(~real, torch.finfo(mask.dtype).min)
    if mask is None and query.is_cpu and _is_mergeable(tensors, impl):
        return _merged(*tensors, scaling)
    return _in_torch(*tensors, mask, plain, scaling)


def _obstacle(tensors: tuple[torch.Tensor, ...], options: tuple[torch.Tensor | None, ...]) -> str | None:
    """Why the kernels cannot take these tensors."""
    if not fits_fused(*tensors[:2]):
        return f"it takes up to {MOST_QUERIES} queries of all streams for each key/value head"
    return decode_obstacle(tensors, options)


def _is_mergeable(tensors: tuple[torch.Tensor, ...], impl: Impl) -> bool:
    """Whether flash attention supports these tensors, without gradients, and without rounding before the merge."""
    precise = tensors[0].dtype not in HALVES and all(x.dtype == tensors[0].dtype for x in tensors)
    return precise and not wants_gradients(tensors) and is_mergeable(*tensors[:3], impl)


def _merged(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    (R, heads, _, D), (B, G, _, _), Q = query.shape, key.shape, prefix_k.shape[0]
    P, n = R // B, heads // G
    by_stream = query.view(P, B, G, n, D)
    grouped = by_stream.permute(1, 2, 0, 3, 4).reshape(B, G, P * n, D)  # all queries of a key/value head
    found = flash(grouped, key, value, False, scaling)
    output, lse = (x.view(B, G, P, n, -1).permute(2, 0, 1, 3, 4) for x in found)  # (P, B, G, n, Dv), (P, B, G, n, 1)
    with_prefix = by_stream[P - Q :].transpose(1, 2).reshape(Q, G, B * n, D)
    found = flash(with_prefix, prefix_k, prefix_v, False, scaling)
    over_prefix, prefix_lse = (x.view(Q, G, B, n, -1).transpose(1, 2) for x in found)  # (Q, B, G, n, Dv), (..., 1)
    share = torch.sigmoid(prefix_lse - lse[P - Q :])  # the weight of the prefix, (Q, B, G, n, 1)
    output[P - Q :].lerp_(over_prefix, share)
    return output.reshape(R, heads, 1, -1)


def _in_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    mask: torch.Tensor | None,
    plain: int,
    scaling: float | None,
) -> torch.Tensor:
    (R, heads, _, D), (B, G, _, _), (Q, _, T, Dv) = query.shape, key.shape, prefix_v.shape
    P, n = R // B, heads // G
    dtype = torch.promote_types(query.dtype, torch.float32)
    piece = None
    if key.dtype != dtype and not torch.compiler.is_compiling():
        piece = max(1, PIECE // (B * G * D))

    def pieces(states: torch.Tensor, dim: int) -> Sequence[torch.Tensor]:
        return (states,) if piece is None else states.split(piece, dim)

    scaled = (query.to(dtype) * (D**-0.5 if scaling is None else scaling)).view(P, B, G, n, D)
    by_stream = scaled[P - Q :].transpose(1, 2).reshape(Q * G, B * n, D)
    of_prefix = torch.bmm(by_stream, prefix_k.to(dtype).flatten(0, 1).mT)  # (Q*G, B*n, T)
    of_prefix = of_prefix.view(Q, G, B, n, T).permute(2, 1, 0, 3, 4)  # (B, G, Q, n, T)
    if plain:  # stream 0 has no prefix
        of_prefix = torch.cat([of_prefix.new_full((B, G, 1, n, T), -torch.inf), of_prefix], dim=2)
    grouped = scaled.permute(1, 2, 0, 3, 4).reshape(B * G, P * n, D)  # all queries of a key/value head
    parts = [torch.bmm(grouped, keys.to(dtype).flatten(0, 1).mT) for keys in pieces(key, 2)]  # (B*G, P*n, K)
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
    products = zip(pieces(grouped, -1), pieces(value, 2), strict=True)
    over_cache = (torch.bmm(part, values.to(dtype).flatten(0, 1)) for part, values in products)  # each (B*G, P*n, Dv)
    output = functools.reduce(torch.add, over_cache).view(B, G, P, n, Dv).permute(2, 0, 1, 3, 4)  # (P, B, G, n, Dv)
    with_prefix = output[P - Q :] + over_prefix
    output = torch.cat([output[: P - Q], with_prefix]) if plain else with_prefix
    return output.reshape(R, heads, 1, Dv).to(query.dtype)
