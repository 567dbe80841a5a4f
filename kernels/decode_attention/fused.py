"""Decode attention on a GPU: one token of each row over its stream's prefix and its cache, both read in place.

The work is split over the sequence: a program takes one key/value head of one row, all queries that share it, and a
part of `[prefix | cache]`; a second kernel merges the parts by their log-sum-exp. Tokens beyond `length` are not read.
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from parscale.kernels.decode_attention.kernels import merge_kernel, part_kernel
from parscale.kernels.launch import Gpu, cdiv, dependent, gpu_of, last_contiguous, launch, operand, power_of_2

MAX_SPLITS = 64


@functools.lru_cache(maxsize=256)  # asked in every layer
def part_config(queries: int, D: int, V: int, dtype: torch.dtype, gpu: Gpu) -> dict[str, int]:
    """Block of tokens, warps and stages of `part_kernel` for so many queries of a key/value head."""
    half = dtype.itemsize == 2
    # 32 KiB of keys and values in a block; 16 in float32, or if 32 would leave only one program to a multiprocessor
    block = 32768 if half and not gpu.is_small else 16384
    size = (max(16, power_of_2(D)) + max(16, power_of_2(V))) * dtype.itemsize  # bytes of a token
    BT = 1 << (block // size).bit_length() - 1  # a power of 2
    BT = max(16, min(64 if gpu.is_hip else 128, BT))
    # float32 products keep their factors in registers
    config = {"BT": BT, "num_warps": 4 if half else 8, "num_stages": 1 if gpu.is_hip else 3}
    if part_shared(config, queries, D, V, dtype, gpu) > gpu.most_shared:  # 64 queries in float32, D = 256, 100 KiB
        config["num_stages"] = 1
    return config


def part_shared(config: dict[str, int], queries: int, D: int, V: int, dtype: torch.dtype, gpu: Gpu) -> int:
    """Bytes of shared memory of a program of `part_kernel`, as Triton lays it out."""
    BT, stages = config["BT"], config["num_stages"]
    BM, BD, BV = max(16, power_of_2(queries)), max(16, power_of_2(D)), max(16, power_of_2(V))
    if gpu.is_hip:  # one buffer at a time, which converts a tile between layouts
        return max(BM, BT) * max(BD, BV) * dtype.itemsize
    if gpu.has_warpgroups and BM >= 64 and dtype.itemsize == 2:
        # asynchronous products: a block stays until its product is done, weights stay in registers
        return (stages * BT * (BD + BV) + BM * BD) * dtype.itemsize + 1024
    if stages == 1:  # no block in flight; the buffer of the queries converts the weights too
        return (BT * (BD + BV) + BM * BD) * dtype.itemsize
    # blocks in flight, buffers that convert queries and weights between layouts, and sums over the warps
    return ((stages - 1) * BT * (BD + BV) + BM * (BD + BT)) * dtype.itemsize + 4 * BM


def part_programs(config: dict[str, int], queries: int, D: int, V: int, dtype: torch.dtype, gpu: Gpu) -> int:
    """The number of programs of `part_kernel` that a multiprocessor holds at a time."""
    if gpu.is_hip:
        registers = 256 if queries <= 32 else 512
    else:
        registers = 64 if dtype.itemsize == 4 else 168 if D > 32 else 256
    return gpu.programs(part_shared(config, queries, D, V, dtype, gpu), config["num_warps"], registers)


@functools.lru_cache(maxsize=4096)  # asked in every layer; a growing cache asks anew for each block
def choose_splits(heads: int, blocks: int, resident_programs: int, most_splits: int) -> int:
    """The number of parts into which the sequence of each head is split.

    It minimizes the number of consecutive blocks, plus one for the start of each program. Several parts must save at
    least a tenth, since merging them has a cost.

    Args:
        heads: key/value heads of all rows.
        blocks: number of blocks of tokens for each head.
        resident_programs: number of programs that the GPU holds at a time.
        most_splits: the largest result.
    """

    def steps(splits: int) -> float:
        waves = cdiv(heads * splits, resident_programs)
        return waves * (cdiv(blocks, splits) + 1) * (1.1 if splits > 1 else 1.0)

    return min(range(1, max(1, min(blocks, most_splits)) + 1), key=steps)


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
    """Computes `parscale.kernels.decode_attention`, or `parscale.kernels.shared_decode_attention`.

    The second, if there are fewer rows of keys than of queries. `splits` of the sequence are chosen if `None`.
    """
    (R, heads, _, D), (P, G, T, _), (rows, _, K, _) = query.shape, prefix_k.shape, key.shape
    V, n, gpu = value.shape[3], heads // G, gpu_of(query.device)
    out = torch.empty(R, heads, 1, V, dtype=query.dtype, device=query.device)
    if out.numel() == 0:
        return out
    S = R // rows  # streams that share keys
    plain = S - P if S > 1 else 0  # the first of them, without a prefix
    B = R // P if S == 1 else rows  # rows of a stream; of streams that share keys, P leaves the plain ones out
    query, prefix_k, prefix_v = query.contiguous(), prefix_k.contiguous(), prefix_v.contiguous()
    key, value = last_contiguous(key), last_contiguous(value)
    length, sinks = (x if x is None else x.contiguous() for x in (length, sinks))
    config = part_config(S * n, D, V, query.dtype, gpu)
    if splits is None:
        blocks = cdiv((S - plain) * T, config["BT"]) + cdiv(K, config["BT"])
        resident_programs = gpu.processors * part_programs(config, S * n, D, V, query.dtype, gpu)
        splits = choose_splits(rows * G, blocks, resident_programs, MAX_SPLITS)
    parts, lse = out, None
    if splits > 1:
        parts = torch.empty(R * heads, splits, V, dtype=torch.float32, device=query.device)
        lse = torch.empty(R * heads, splits, dtype=torch.float32, device=query.device)
    mask, mask_strides, mask_options = _mask_arguments(mask, rows, heads, K)
    launch(
        part_kernel,
        (rows * G, splits),
        *(query, key, value, prefix_k, prefix_v, mask, length, sinks, parts, lse),
        *(B, K, splits, float(scaling), *key.stride()[:3], *value.stride()[:3], *mask_strides),
        G=G,
        n=n,
        S=S,
        PLAIN=plain,
        T=T,
        D=D,
        V=V,
        SOFTCAP=softcap,
        **mask_options,
        LENGTHS=length is not None and length.numel() > 1,
        EARLY=splits > 1 and gpu.dependent_launch,
        DOT=operand(query.dtype),
        **config,
    )
    if splits > 1:
        launch(
            merge_kernel,
            (R * heads,),
            *(parts, lse, sinks, out, splits),
            heads=heads,
            V=V,
            BS=16,
            EARLY=gpu.dependent_launch,
            num_warps=4,
            **dependent(gpu.dependent_launch),
        )
    return out


def _mask_arguments(
    mask: torch.Tensor | None, rows: int, heads: int, K: int
) -> tuple[torch.Tensor | None, tuple[int, int], dict[str, Any]]:
    """The mask in the kernel's form, its strides by row and by head, and the compile-time options."""
    if mask is None:
        return None, (0, 0), {"LEAST": None, "MASKED_PREFIX": False, "HEADS": False}
    least = None if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
    mask = last_contiguous(mask.view(torch.uint8) if mask.dtype == torch.bool else mask)
    strides = mask.expand(rows, heads, 1, -1).stride()
    options = {"LEAST": least, "MASKED_PREFIX": mask.shape[3] != K, "HEADS": mask.shape[1] != 1}
    return mask, (strides[0], strides[1]), options


# Defined by its schema and not by `custom_op`, which calls a function of each operator four times over: for autograd,
# for aliases, for the device. This one runs in every layer for every token, has no gradient, and returns a new tensor.
_NAME = "parscale::decode_attention"
torch.library.define(
    _NAME,
    "(Tensor query, Tensor key, Tensor value, Tensor prefix_k, Tensor prefix_v, Tensor? mask, Tensor? length, "
    "Tensor? sinks, float scaling, float? softcap) -> Tensor",
)
torch.library.impl(_NAME, "default")(decode)


def _without_data(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any) -> torch.Tensor:
    return query.new_empty(query.shape[0], query.shape[1], 1, value.shape[3])


torch.library.register_fake(_NAME, _without_data)
# `decode` as a torch operator: supports torch.compile and CUDA graphs. It has no gradient.
decode_op = torch.ops.parscale.decode_attention.default
