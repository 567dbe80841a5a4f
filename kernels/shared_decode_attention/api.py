"""The public function of decode attention over shared keys: one token of each stream; the cache is read once for all.

The streams are more queries of a key/value head. On a CPU, without a mask and gradients and in full precision, torch's
flash attention runs (`merged.py`). Elsewhere the scores of prefixes and cache are joined (`reference.py`). The fused
implementation is the one for streams with their own keys (`parscale.kernels.decode_attention`).
"""

from __future__ import annotations

import functools

import torch

from parscale.kernels.causal_attention.api import HALVES, flash_supports
from parscale.kernels.decode_attention.api import decode_obstacle
from parscale.kernels.decode_attention.checks import check_decode_shapes
from parscale.kernels.dispatch import Impl, runs_fused, wants_gradients
from parscale.kernels.shared_decode_attention.merged import shared_decode_merged
from parscale.kernels.shared_decode_attention.reference import shared_decode_reference
from parscale.kernels.shared_rows import plain_rows


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
        mask: `None`, or over the cache: boolean (True: attend) or additive, `(B or 1, heads or 1, 1, K)`.
        length: number of real tokens among the K, `(B,)` or one, on the device. Entries beyond it may have any value.
        scaling: factor on the scores; `D ** -0.5` if `None`.
        impl: as in `parscale.kernels.decode_attention`; `"fused"` supports up to 64 queries of all streams for each
            key/value head.

    Returns:
        `(P*B, heads, 1, Dv)` in the dtype of `query`.

    Raises:
        ValueError: shapes do not fit together, `impl` is unknown, or `"fused"` cannot run.
    """
    tensors = (query, key, value, prefix_k, prefix_v)
    check_decode_shapes("shared_decode_attention", tensors, mask, length, None, shares_keys=True)
    plain = plain_rows(query, key, prefix_k)
    if runs_fused(impl, query, functools.partial(decode_obstacle, tensors, (mask, length))):
        from parscale.kernels.decode_attention.fused import decode_op

        factor = query.shape[-1] ** -0.5 if scaling is None else scaling
        return decode_op(*tensors, mask, length, None, factor, None)
    if length is not None:
        real = torch.arange(key.shape[2], device=key.device) < length.view(-1, 1, 1, 1)  # (B or 1, 1, 1, K)
        key, value = (x.masked_fill(~real.mT, 0.0) for x in (key, value))  # zero times NaN is NaN
        tensors = (query, key, value, prefix_k, prefix_v)
        if mask is None or mask.dtype == torch.bool:
            mask = real if mask is None else mask & real
        else:
            mask = mask.masked_fill(~real, torch.finfo(mask.dtype).min)
    if mask is None and query.is_cpu and _can_merge_exactly(tensors, impl):
        return shared_decode_merged(*tensors, scaling)
    return shared_decode_reference(*tensors, mask, plain, scaling)


def _can_merge_exactly(tensors: tuple[torch.Tensor, ...], impl: Impl) -> bool:
    """Whether flash attention supports these tensors, without gradients, and without rounding before the merge."""
    query, key, value = tensors[:3]
    precise = query.dtype not in HALVES and all(x.dtype == query.dtype for x in tensors)
    return precise and not wants_gradients(tensors) and flash_supports(query, key, value, impl)
