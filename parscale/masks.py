"""Room for the prefix in attention masks: T columns in front, open to every query."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


def extend_dense_mask(mask: torch.Tensor, prefix_length: int) -> torch.Tensor:
    """A mask ``(..., S, K)`` as ``(..., S, T + K)``.

    Args:
        mask: boolean (True: attend), or additive floats (0: attend).
        prefix_length: T.
    """
    return nn.functional.pad(mask, (prefix_length, 0), value=mask.dtype == torch.bool)


def extend_block_mask(mask: BlockMask, prefix_length: int, num_rows: int) -> BlockMask:
    """A FlexAttention mask over ``(S, K)`` as one over ``(S, T + K)``.

    Args:
        mask: made for the P*B rows of the streams, or by the caller for B rows or one: it then repeats for each stream.
        prefix_length: T.
        num_rows: P*B.
    """
    own_rows, heads, S, K = mask.shape
    device = mask.kv_num_blocks.device
    inner = mask.mask_mod
    own_row = torch.arange(num_rows, device=device) % own_rows  # the row of ``mask`` that each row takes

    # torch 2.13 compiles some forms of these indices, such as ``(kv - T).clamp(min=0)``, to C++ that is none.
    def with_prefix(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return (kv < prefix_length) | inner(b, h, q, (kv + (K - prefix_length)) % K)

    def with_prefix_and_rows(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return with_prefix(own_row[b], h, q, kv)

    return create_block_mask(
        with_prefix if own_rows == num_rows else with_prefix_and_rows,
        None if own_rows == 1 else num_rows,
        None if heads == 1 else heads,
        S,
        prefix_length + K,
        device=device,
        BLOCK_SIZE=mask.BLOCK_SIZE,
    )
