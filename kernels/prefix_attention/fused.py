"""Decode attention on a GPU: one token of each row over its stream's prefix and its cache, both read in place.

Split over the sequence: a program takes one key/value head of one row, all queries that share it, and a part of
``[prefix | cache]``; a second kernel merges the parts by their log-sum-exp. What a mask hides is not read.
"""

from __future__ import annotations

import torch
import triton

from parscale.kernels.launch import WAVES, launch, multiprocessors, on_hip, operand, power_of_2
from parscale.kernels.prefix_attention.decode_kernels import merge_kernel, part_kernel

MAX_SPLITS = 64


def part_config(BD: int, BV: int, dtype: torch.dtype) -> dict[str, int]:
    """Block of tokens, warps and stages of :func:`part_kernel`."""
    half = dtype.itemsize == 2
    # keys and values of a block in 32 KiB, in 16 of float32, and a power of 2
    BT = 1 << ((32768 if half else 16384) // ((BD + BV) * dtype.itemsize)).bit_length() - 1
    BT = max(16, min(64 if on_hip() else 128, BT))
    # float32 products keep their factors in registers
    return {"BT": BT, "num_warps": 4 if half else 8, "num_stages": 1 if on_hip() else 3}


def decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    mask: torch.Tensor | None,
    length: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    *,
    splits: int | None = None,
) -> torch.Tensor:
    """As :func:`parscale.kernels.prefix_attention.decode_attention`; ``splits`` of the sequence, chosen if ``None``."""
    (R, heads, _, D), (P, G, T, _) = query.shape, prefix_k.shape
    K, V, n = key.shape[2], value.shape[3], heads // G
    out = torch.empty(R, heads, 1, V, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    BM, BD, BV = max(16, power_of_2(n)), max(16, power_of_2(D)), max(16, power_of_2(V))
    config = part_config(BD, BV, query.dtype)
    blocks = triton.cdiv(T, config["BT"]) + triton.cdiv(K, config["BT"])
    if splits is None:
        splits = WAVES * multiprocessors(query.device) // (R * G)
    splits = max(1, min(splits, blocks, MAX_SPLITS))
    whole = splits == 1
    rows = 0 if whole else R * heads
    parts = torch.empty(rows, splits, V, dtype=torch.float32, device=query.device)
    lse = torch.empty(rows, splits, dtype=torch.float32, device=query.device)
    kind, least, mask_strides, per_head, masked_prefix = 0, 0.0, (0, 0, 0), False, False
    if mask is not None:
        kind = 1 if mask.dtype == torch.bool else 2
        least = 0.0 if kind == 1 else torch.finfo(mask.dtype).min
        mask = mask.view(torch.uint8) if kind == 1 else mask
        per_head, masked_prefix = mask.shape[1] != 1, mask.shape[3] != K
        seen = mask.expand(R, heads, 1, mask.shape[3]).stride()
        mask_strides = (seen[0], seen[1], seen[3])
    strides = (query.stride(0), query.stride(1), query.stride(3), *key.stride(), *value.stride())
    s_length = 0 if length is None or length.numel() == 1 else length.stride(0)
    launch(
        part_kernel,
        (R * G, splits),
        *(query, key, value, prefix_k, prefix_v, query if mask is None else mask),
        *(query if length is None else length, query if sinks is None else sinks, out, parts, lse),
        *(R // P, G, K, splits, float(scaling), float(softcap or 1.0), float(least)),
        *(*strides, *prefix_k.stride(), *prefix_v.stride(), *mask_strides, s_length),
        n=n,
        T=T,
        D=D,
        V=V,
        BM=BM,
        BD=BD,
        BV=BV,
        MASK=kind,
        MASKED_PREFIX=masked_prefix,
        PER_HEAD=per_head,
        SOFTCAP=softcap is not None,
        SINKS=sinks is not None,
        LENGTH=length is not None,
        WHOLE=whole,
        DOT=operand(query.dtype),
        **config,
    )
    if not whole:
        launch(
            merge_kernel,
            (R * heads,),
            *(parts, lse, lse if sinks is None else sinks, out, heads, splits),
            V=V,
            BS=power_of_2(splits),
            BV=BV,
            SINKS=sinks is not None,
            num_warps=4,
        )
    return out


@torch.library.custom_op("parscale::decode_attention", mutates_args=())
def decode_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    mask: torch.Tensor | None,
    length: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """As :func:`decode`, registered: torch.compile and CUDA graphs know it. It has no gradient."""
    return decode(query, key, value, prefix_k, prefix_v, mask, length, sinks, scaling, softcap)


@decode_op.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    prefix_k: torch.Tensor,
    prefix_v: torch.Tensor,
    mask: torch.Tensor | None,
    length: torch.Tensor | None,
    sinks: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], 1, value.shape[3])
