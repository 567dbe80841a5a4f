"""The whole aggregator on a GPU: host functions, and their registration with torch.

Two regimes. With few rows (decoding) the time is that of reading ``weight1`` once: one kernel multiplies it as it lies,
in splits of the hidden dimension, another does everything else. With many rows (prefill, training) the time is that of
the matrix product: the streams are added up in registers from stream-major weights. That copy of the weights, made in
every call and never kept, costs as many bytes as reading them twice more, whatever the number of rows; the
rearranged copy of the activations that it replaces costs that for every row.

A stream's columns of ``weight1 (H, H*P)`` lie P numbers apart, and cuBLAS wants one of a matrix's two strides to be 1,
so that it needs the stream-major copy too. It adds the streams up in its result, which for half precision must
then be float32: P - 1 more readings and writings of it. So half precision is multiplied by the kernel, and float32,
which has no fast matrix units in Triton, by cuBLAS.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import nn

from parscale.kernels.aggregate import fused as aggregate_fused
from parscale.kernels.aggregator.kernels import (
    few_rows_kernel,
    finish_kernel,
    many_rows_kernel,
    split_weight_kernel,
)
from parscale.kernels.launch import WAVES, launch, multiprocessors, on_hip, on_hopper, operand, power_of_2

FEW_ROWS = 32
Tensors = tuple[torch.Tensor, ...]


def split_config(P: int) -> dict[str, int]:
    """Block and warps of :func:`split_weight_kernel`."""
    return {"BM": 4096 // power_of_2(P), "num_warps": 4}


def few_rows_config(P: int, dtype: torch.dtype) -> dict[str, int]:
    """Blocks, warps and stages of :func:`few_rows_kernel`."""
    # 256 columns of weight at a time, or a multiple of 16
    BP = power_of_2(P)
    BH = max(1, 16 // BP, (512 // dtype.itemsize) // BP)
    return {"BJ": 16, "BH": BH, "num_warps": 4, "num_stages": 2 if on_hip() else 4}


def finish_config(P: int, H: int) -> dict[str, int]:
    """Block and warps of :func:`finish_kernel`."""
    return {"BH": min(power_of_2(H), max(64, 4096 // power_of_2(P))), "num_warps": 8}


def many_rows_config(N: int, H: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Blocks, warps and stages of :func:`many_rows_kernel`.

    Of the blocks that this GPU takes without spilling, those that keep its processors busiest, the larger ones if in
    doubt. ROCm lacks the shared memory for 256 columns, all but Hopper the registers.
    """
    columns = (256, 128) if on_hopper(device) else (128,)
    processors = multiprocessors(device)

    def time(BJ: int) -> float:
        blocks = triton.cdiv(N, 128) * triton.cdiv(H, BJ)
        # a block of half the size takes longer than half the time, since it reads more for each product
        return triton.cdiv(blocks, processors) * BJ * (1.0 if BJ == 256 else 1.1)

    blocks = {"BN": 128, "BJ": min(columns, key=time), "BH": 64 if dtype.itemsize == 2 else 32, "GROUP": 8}
    return blocks | {"num_warps": 8, "num_stages": 2 if on_hip() else 3}


def split_weight(weight: torch.Tensor, P: int) -> torch.Tensor:
    """``(H, H*P)`` -> ``(P, H, H)``, by stream, output feature, hidden feature."""
    H = weight.shape[0]
    split = torch.empty(P, H, H, dtype=weight.dtype, device=weight.device)
    config = split_config(P)
    grid = (triton.cdiv(H * H, config["BM"]),)
    launch(split_weight_kernel, grid, weight.contiguous(), split, H * H, P=P, BP=power_of_2(P), **config)
    return split


def forward(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    smoothing: float,
    save: bool,
    *,
    product: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``x (P, N, H)`` -> mixed ``(N, H)``; before SiLU ``(N, H)`` if ``save``, else nothing; float32 logits ``(N, P)``.

    Args:
        x: any strides.
        weight1: ``(H, H*P)``.
        bias1: ``(H,)``.
        weight2: ``(P, H)``.
        bias2: ``(P,)``.
        smoothing: epsilon.
        save: whether a backward pass follows.
        product: who does the first product of many rows, ``"triton"`` or ``"cublas"``; by dtype if ``None``.
    """
    P, N, H = x.shape
    if N == 0 or H == 0:
        empty = torch.empty(N, H, dtype=x.dtype, device=x.device)
        return empty, torch.empty_like(empty), torch.zeros(N, P, dtype=torch.float32, device=x.device)
    inner = torch.empty(N if save else 0, H, dtype=x.dtype, device=x.device)
    if N <= FEW_ROWS:
        return _few_rows(x, weight1, bias1, weight2, bias2, smoothing, inner)
    if product is None:
        product = "cublas" if x.dtype == torch.float32 else "triton"
    multiply = {"triton": _many_rows, "cublas": _many_rows_by_cublas}[product]
    logits = multiply(x, weight1, bias1, weight2, bias2, inner)
    return aggregate_fused.forward(x, logits, smoothing), inner, logits


def _few_rows(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    smoothing: float,
    inner: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    P, N, H = x.shape
    BP, config = power_of_2(P), few_rows_config(P, x.dtype)
    blocks, columns = triton.cdiv(H, config["BH"]), triton.cdiv(H, config["BJ"])
    splits = max(1, min(blocks, WAVES * multiprocessors(x.device) // columns, 16))
    steps = triton.cdiv(blocks, splits)
    splits = triton.cdiv(blocks, steps)
    partial = torch.empty(splits, N, H, dtype=torch.float32, device=x.device)
    launch(
        few_rows_kernel,
        (columns, splits),
        *(x, weight1.contiguous(), partial, N, H, steps, *x.stride()),
        P=P,
        BP=BP,
        BN=max(16, power_of_2(N)),
        DOT=operand(x.dtype),
        **config,
    )
    out = torch.empty(N, H, dtype=x.dtype, device=x.device)
    logits = torch.empty(N, P, dtype=torch.float32, device=x.device)
    launch(
        finish_kernel,
        (N,),
        *(x, partial, bias1.contiguous(), weight2.contiguous(), bias2.contiguous(), out, inner, logits, N, H, splits),
        *x.stride(),
        SMOOTHING=smoothing,
        SAVE=inner.numel() > 0,
        P=P,
        BP=BP,
        **finish_config(P, H),
    )
    return out, inner, logits


def _many_rows(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    inner: torch.Tensor,
) -> torch.Tensor:
    """The logits ``(N, P)``, float32; fills ``inner``."""
    P, N, H = x.shape
    config = many_rows_config(N, H, x.dtype, x.device)
    columns = triton.cdiv(H, config["BJ"])
    partial = torch.empty(columns, N, P, dtype=torch.float32, device=x.device)
    launch(
        many_rows_kernel,
        (triton.cdiv(N, config["BN"]) * columns,),
        *(x, split_weight(weight1, P), bias1.contiguous(), weight2.contiguous(), inner, partial, N, H, *x.stride()),
        P=P,
        BP=max(16, power_of_2(P)),
        EVEN=H % config["BH"] == 0,
        SAVE=inner.numel() > 0,
        DOT=operand(x.dtype),
        **config,
    )
    return partial.sum(0) + bias2


def _many_rows_by_cublas(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    inner: torch.Tensor,
) -> torch.Tensor:
    """As :func:`_many_rows`."""
    split = split_weight(weight1, x.shape[0]).transpose(1, 2)  # (P, hidden, inner)
    total = bias1.float().expand(x.shape[1], -1)
    for p in range(x.shape[0]):
        if x.dtype == torch.float32:
            total = torch.addmm(total, x[p], split[p])
        else:
            total = torch.addmm(total.contiguous(), x[p], split[p], out_dtype=torch.float32)
    if inner.numel():
        inner.copy_(total)
    return nn.functional.linear(nn.functional.silu(total), weight2.float(), bias2.float())


def backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    inner: torch.Tensor,
    logits: torch.Tensor,
    smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of ``x``, ``weight1``, ``bias1``, ``weight2`` and ``bias2``; sums in fixed order, no atomics."""
    P, N, H = x.shape
    if N == 0:
        zeros = torch.zeros_like
        return torch.empty_like(x), zeros(weight1), weight1.new_zeros(H), zeros(weight2), weight2.new_zeros(P)
    dx, dlogits = aggregate_fused.backward(gradient, x, logits, smoothing)  # (P, N, H), (N, P) float32
    z = inner.float()
    sigmoid = torch.sigmoid(z)
    dz = (dlogits @ weight2.float()) * (sigmoid * (1 + z * (1 - sigmoid)))  # (N, H)
    dweight2 = dlogits.T @ (z * sigmoid)  # (P, H)
    dbias1, dbias2 = dz.sum(0), dlogits.sum(0)
    dz = dz.to(x.dtype)
    by_row = dz.expand(P, N, H)
    dx.baddbmm_(by_row, split_weight(weight1, P))  # (P, N, inner) @ (P, inner, hidden)
    dweight1 = torch.bmm(by_row.transpose(1, 2), x)  # (P, inner, N) @ (P, N, hidden)
    dweight1 = dweight1.permute(1, 2, 0).reshape(H, H * P)
    dtype = weight1.dtype
    return dx, dweight1, dbias1.to(dtype), dweight2.to(dtype), dbias2.to(dtype)


@torch.library.custom_op("parscale::aggregator", mutates_args=())
def aggregator_op(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    smoothing: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`forward`, registered: torch.compile, CUDA graphs, autograd (once) and vmap know it."""
    return forward(x, weight1, bias1, weight2, bias2, smoothing, save)


@aggregator_op.register_fake
def _(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    smoothing: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    P, N, H = x.shape
    return x.new_empty(N, H), x.new_empty(N if save else 0, H), x.new_empty(N, P, dtype=torch.float32)


@torch.library.custom_op("parscale::aggregator_backward", mutates_args=())
def aggregator_backward_op(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    inner: torch.Tensor,
    logits: torch.Tensor,
    smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """As :func:`backward`, registered; not differentiable again."""
    return backward(gradient, x, weight1, weight2, inner, logits, smoothing)


@aggregator_backward_op.register_fake
def _(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    inner: torch.Tensor,
    logits: torch.Tensor,
    smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    P, _, H = x.shape
    weights = (weight1.new_empty(H, H * P), weight1.new_empty(H), weight2.new_empty(P, H), weight2.new_empty(P))
    return x.new_empty(x.shape), *weights


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight1, _, weight2, _, ctx.smoothing, ctx.save = inputs
    _, inner, logits = output
    ctx.mark_non_differentiable(inner, logits)
    ctx.save_for_backward(x, weight1, weight2, inner, logits)


def _differentiate(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if not ctx.save:
        raise RuntimeError("parscale::aggregator kept nothing for a backward pass; call it with save=True.")
    return *aggregator_backward_op(gradient, *ctx.saved_tensors, ctx.smoothing), None, None


aggregator_op.register_autograd(_differentiate, setup_context=_setup)


@aggregator_op.register_vmap
def _(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[Any, tuple[int, int, int]]:
    results = []
    for index in range(info.batch_size):
        one = (x if dim is None else x.select(dim, index) for x, dim in zip(args, dims, strict=True))
        results.append(aggregator_op(*one))
    return tuple(torch.stack(each) for each in zip(*results, strict=True)), (0, 0, 0)
