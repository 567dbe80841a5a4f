"""Masks for streams: room for the prefix, the rows of stream 0, the last queries; each made once for all layers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from parscale.compat.torch import mark_static
from parscale.kernels import visible_lengths
from parscale.kernels.decode_attention import runs_decode_kernel
from parscale.kernels.dispatch import Impl

Mask = torch.Tensor | BlockMask | None  # dense, of FlexAttention, or none
Memo = dict[Any, tuple[Any, Any]]  # of a kind and a mask's id: a weak reference to the mask, and what was made of it


def extend_dense_mask(mask: torch.Tensor, prefix_length: int) -> torch.Tensor:
    """Extends a mask `(..., S, K)` to `(..., S, T + K)`.

    Args:
        mask: boolean (True: attend), or additive floats (0: attend).
        prefix_length: T.
    """
    if mask.dtype != torch.bool:
        return nn.functional.pad(mask, (prefix_length, 0))
    # Not padded with True: torch 2.13 would fuse the padding with the making of the mask into invalid C++ for CPUs.
    return torch.cat([mask.new_ones(*mask.shape[:-1], prefix_length), mask], dim=-1)


def leading_zeros(mask: object) -> torch.Tensor | None:
    """The number of leading zeros in each row of a mask `(R, K)`, `(R,)`; `None` for another mask or none."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return None
    return (mask.cumsum(-1) == 0).sum(-1)


def is_causal_table(buffer: torch.Tensor) -> bool:
    """Whether a layer's buffer is a causal mask `(1, 1, N, N)`, true where the row's token sees the column's."""
    return buffer.dtype == torch.bool and buffer.ndim == 4 and buffer.shape[-1] == buffer.shape[-2]


def keep_sizes_static(*tensors: torch.Tensor) -> None:
    """Makes FlexAttention compile again for each size of these tensors on a CPU.

    transformers compiles it once for all models. After two different lengths torch makes sizes dynamic, and then
    generates invalid C++ (torch 2.13).
    """
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor.is_cpu:
            mark_static(tensor)


def extend_block_mask(mask: BlockMask, prefix_length: int, num_rows: int) -> BlockMask:
    """Extends a FlexAttention mask over `(S, K)` to `(S, T + K)`.

    Args:
        mask: for the P*B rows of the streams, or the caller's for B rows or one row, which is repeated for each stream.
        prefix_length: T.
        num_rows: P*B.
    """
    own_rows, heads, S, K = mask.shape
    device = mask.kv_num_blocks.device
    inner = mask.mask_mod

    def with_prefix(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return (kv < prefix_length) | inner(b % own_rows, h, q, (kv - prefix_length).clamp(min=0))

    shape = None if own_rows == 1 else num_rows, None if heads == 1 else heads, S, prefix_length + K
    if device.type != "cpu":
        # compiled, as in transformers: otherwise the whole (S, T + K) mask would be materialized
        return torch.compile(create_block_mask)(with_prefix, *shape, device=device, BLOCK_SIZE=mask.BLOCK_SIZE)

    # On a CPU, torch 2.13 compiles a function that contains more than a few dynamic sizes to invalid C++: this one
    # contains only the sizes of its table.
    dense = create_mask(with_prefix, *shape, device=device).expand(num_rows, -1, -1, -1)  # (R, heads or 1, S, T + K)
    if heads == 1:
        dense = dense[:, 0]  # (R, S, T + K)
    keep_sizes_static(dense)

    def look_up(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return dense[b, q, kv]

    def look_up_by_head(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return dense[b, h, q, kv]

    function = look_up if heads == 1 else look_up_by_head
    return create_block_mask(function, *shape, device=device, BLOCK_SIZE=mask.BLOCK_SIZE)


def once(memo: Memo, kind: str, mask: torch.Tensor | BlockMask, make: Callable[[], Any]) -> Any:
    """What `make` makes of a mask, or of positions: once for all layers that share it, and kept as long as it is there.

    A model on several devices copies the mask for each layer of the others.
    """
    compiling = torch.compiler.is_compiling()
    if compiling and isinstance(mask, torch.Tensor):
        return make()  # the compiler shares the result
    key = kind, compiling, id(mask)
    entry = memo.get(key)
    if compiling:  # without weak references, which it does not know
        entry = memo[key] = (None, make()) if entry is None else entry
    elif entry is None or entry[0]() is not mask:
        entry = memo[key] = (weakref.ref(mask, lambda _: memo.pop(key, None)), make())
    return entry[1]


def _alone(mask: torch.Tensor) -> torch.Tensor:
    """The mask as a tensor of its own on the same memory: a slice of the mask itself would keep it."""
    return mask if mask.requires_grad else mask.detach()


def extended_mask(memo: Memo, mask: Mask, prefix_length: int, num_rows: int) -> Mask:
    """The mask with columns for the prefix; made once for all layers that share it.

    Args:
        memo: what was made of this pass's masks.
        mask: a dense mask or one of FlexAttention.
        prefix_length: T.
        num_rows: P*B.
    """
    if mask is None:
        return None

    def extend() -> Mask:
        if isinstance(mask, torch.Tensor):
            return extend_dense_mask(mask, prefix_length)
        return extend_block_mask(mask, prefix_length, num_rows)

    return once(memo, "extended", mask, extend)


def visible_lengths_once(memo: Memo, mask: torch.Tensor) -> torch.Tensor:
    """The result of `parscale.kernels.visible_lengths`; computed once for all layers that share the mask.

    Args:
        memo: as in `extended_mask`.
        mask: dense.
    """
    return once(memo, "lengths", mask, lambda: visible_lengths(mask))


def lengths_for_kernel(
    memo: Memo, mask: torch.Tensor, tensors: tuple[torch.Tensor, ...], impl: Impl
) -> torch.Tensor | None:
    """The visible lengths where decode attention runs by its kernel, which reads nothing beyond; elsewhere `None`.

    Args:
        memo: as in `extended_mask`.
        mask: dense; it stands for a cache that is longer than its tokens, or for padding.
        tensors: query, key, value, prefix_k and prefix_v.
        impl: the implementation that was asked for.
    """
    return visible_lengths_once(memo, mask) if runs_decode_kernel(impl, tensors, mask) else None


def rows_of_mask(memo: Memo, mask: Mask, num_rows: int) -> Mask:
    """The mask of the first rows; made once for all layers that share it.

    Args:
        memo: as in `extended_mask`.
        mask: a dense mask, a padding mask `(R, K)` or one of FlexAttention, for at least that many rows or for one row;
            or `None`.
        num_rows: number of rows.
    """
    if mask is None or mask.shape[0] in (1, num_rows):
        return mask

    def first_rows() -> Mask:
        if isinstance(mask, torch.Tensor):
            return _alone(mask)[:num_rows]
        piece = mask[:num_rows]
        piece.mask_mod = mask.mask_mod  # the first rows keep their indices
        return piece

    return once(memo, "rows", mask, first_rows)


def last_queries_of_mask(
    memo: Memo, mask: torch.Tensor | BlockMask, positions: int, chosen: torch.Tensor | None
) -> Mask:
    """The mask of the last queries of chosen rows; made once for all layers that share it.

    Args:
        memo: as in `extended_mask`.
        mask: `(B or 1, heads or 1, S, K)`; a padding mask `(B, K)`; or one of FlexAttention, which is used for all its
            rows and queries.
        positions: number of queries.
        chosen: indices of the rows; `None` means all.
    """
    if isinstance(mask, BlockMask):
        return mask
    rows = None if mask.shape[0] == 1 else chosen
    if rows is None and mask.ndim != 4:
        return mask

    def last() -> Mask:
        piece = _alone(mask)[:, :, -positions:] if mask.ndim == 4 else mask
        return piece if rows is None else piece[rows.to(piece.device)]

    return once(memo, "last", mask, last)
