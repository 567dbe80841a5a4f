"""Room for the prefix in attention masks: T columns in front, open to every query."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, create_mask

from parscale.compat.torch import mark_static
from parscale.kernels import visible_lengths


def extend_dense_mask(mask: torch.Tensor, prefix_length: int) -> torch.Tensor:
    """A mask `(..., S, K)` as `(..., S, T + K)`.

    Args:
        mask: boolean (True: attend), or additive floats (0: attend).
        prefix_length: T.
    """
    if mask.dtype != torch.bool:
        return nn.functional.pad(mask, (prefix_length, 0))
    # not padded with True: of that, fused with the making of the mask, torch 2.13 makes C++ for CPUs that is none
    return torch.cat([mask.new_ones(*mask.shape[:-1], prefix_length), mask], dim=-1)


def leading_zeros(mask: Any) -> torch.Tensor | None:
    """How many zeros each row of a mask `(R, K)` begins with, `(R,)`; `None` for another mask or none."""
    if not isinstance(mask, torch.Tensor) or mask.ndim != 2:
        return None
    return (mask.cumsum(-1) == 0).sum(-1)


def keep_sizes_static(*tensors: torch.Tensor) -> None:
    """Lets FlexAttention be compiled anew for each size of these tensors, on a CPU.

    transformers compiles it once for all models. After two lengths of any of them torch takes sizes as variables, and
    makes C++ that is none of them (torch 2.13).
    """
    if torch.compiler.is_compiling():
        return
    for tensor in tensors:
        if tensor.is_cpu:
            mark_static(tensor)


def extend_block_mask(mask: BlockMask, prefix_length: int, num_rows: int) -> BlockMask:
    """A FlexAttention mask over `(S, K)` as one over `(S, T + K)`.

    Args:
        mask: made for the P*B rows of the streams, or by the caller for B rows or one: it then repeats for each stream.
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
        # compiled, as transformers' own: otherwise all (S, T + K) are there at once
        return torch.compile(create_block_mask)(with_prefix, *shape, device=device, BLOCK_SIZE=mask.BLOCK_SIZE)

    # Compiled for a CPU by torch 2.13, a function with more than a few sizes in it becomes C++ that is none, once they
    # are dynamic: this one has only its table's.
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


def extended_mask(
    made: dict[Any, tuple[Any, Any]], mask: torch.Tensor | BlockMask | None, prefix_length: int, num_rows: int
) -> torch.Tensor | BlockMask | None:
    """The mask with room for the prefix; made once for all layers that share it.

    Args:
        made: the masks of this pass that were made before, by the id of the mask that they extend.
        mask: dense or FlexAttention's.
        prefix_length: T.
        num_rows: P*B.
    """
    if mask is None:
        return None
    if isinstance(mask, torch.Tensor) and torch.compiler.is_compiling():
        return extend_dense_mask(mask, prefix_length)  # the compiler shares it
    entry = made.get(id(mask))
    if entry is None:
        if isinstance(mask, BlockMask):
            extended: Any = extend_block_mask(mask, prefix_length, num_rows)
        else:
            extended = extend_dense_mask(mask, prefix_length)
        entry = made[id(mask)] = (mask, extended)  # holds the mask, so that its id stays its own
    return entry[1]


def visible_lengths_once(made: dict[Any, tuple[Any, Any]], mask: torch.Tensor) -> torch.Tensor:
    """As `parscale.kernels.visible_lengths`; counted once for all layers that share the mask.

    Args:
        made: as for `extended_mask`.
        mask: dense.
    """
    if torch.compiler.is_compiling():
        return visible_lengths(mask)  # the compiler shares it
    key = "lengths", id(mask)
    if key not in made:
        made[key] = (mask, visible_lengths(mask))
    return made[key][1]


def rows_of_mask(made: dict[Any, tuple[Any, Any]], mask: Any, num_rows: int) -> Any:
    """The mask of the first rows; made once for all layers that share it.

    Args:
        made: as `extended_mask`, under a key of its own.
        mask: dense, a padding mask `(R, K)` or FlexAttention's, of as many rows or more, or of one for all; or none.
        num_rows: how many.
    """
    if mask is None or mask.shape[0] in (1, num_rows):
        return mask
    if torch.compiler.is_compiling():
        return mask[:num_rows]
    key = ("rows", id(mask))
    if key not in made:
        piece = mask[:num_rows]
        if isinstance(mask, BlockMask):
            piece.mask_mod = mask.mask_mod  # the first rows keep their numbers
        made[key] = (mask, piece)
    return made[key][1]


def last_queries_of_mask(
    made: dict[Any, tuple[Any, Any]], mask: Any, positions: int, chosen: torch.Tensor | None
) -> Any:
    """The mask of the last queries of chosen rows; made once for all layers that share it.

    Args:
        made: as `extended_mask`, under a key of its own.
        mask: `(B or 1, heads or 1, S, K)`; a padding mask `(B, K)`; or FlexAttention's, of which all queries are
            wanted.
        positions: how many queries.
        chosen: numbers of the rows; `None`: all.
    """
    key = ("last", id(mask))
    if key not in made:
        piece = mask
        if isinstance(mask, torch.Tensor) and mask.ndim == 4:
            piece = mask[:, :, -positions:]
        if chosen is not None and mask.shape[0] > 1:
            piece = piece[chosen]
        made[key] = (mask, piece)
    return made[key][1]
