"""The whole aggregator on a GPU: host functions, and their registration as torch operators.

There are two cases. With few rows (decoding), reading `weight1` once takes almost all of the time: one kernel
multiplies it in its memory layout, in splits of the hidden dimension. With more rows, the streams are reordered to
match `weight1`'s columns, and cuBLAS multiplies. In both cases a second kernel does the rest.

A forward pass never copies the weights, and no reordered weights are cached between calls: a cache would have to notice
every change of the weights, and some (`.data`, loaders, sharding) cannot be noticed. Up to `N = H` rows, the copy of
the activations is the smaller one.

`x (P, N, H)` may have another dtype than the weights, as under autocast: matrix products use that of the weights.
"""

from __future__ import annotations

from typing import Any

import torch

from parscale.kernels.aggregate import fused as aggregate_fused
from parscale.kernels.aggregator.kernels import few_rows_kernel, finish_kernel, join_kernel, split_kernel
from parscale.kernels.dispatch import no_autocast
from parscale.kernels.launch import Gpu, cdiv, dependent, gpu_of, last_contiguous, launch, operand, power_of_2

FEW_ROWS = 32
MAX_SPLITS = 16


def few_rows_config(P: int, N: int, dtype: torch.dtype, gpu: Gpu) -> dict[str, int]:
    """Blocks, warps and stages of `few_rows_kernel`."""
    # 512 bytes of a row of weights at a time; half as much for more rows, which would need more registers
    BN, size = (16, 512) if N <= 16 else (FEW_ROWS, 256)
    BH = max(1, 16 // P, (size // dtype.itemsize) // P)
    return {"BN": BN, "BJ": 16, "BH": BH, "num_warps": 4, "num_stages": 2 if gpu.is_hip else 4}


def few_rows_programs(P: int, N: int, dtype: torch.dtype, gpu: Gpu) -> int:
    """The number of programs of `few_rows_kernel` that a multiprocessor holds at a time."""
    config = few_rows_config(P, N, dtype, gpu)
    rows = (config["num_stages"] - 1) * (config["BN"] + config["BJ"])
    if dtype == torch.float32:  # whose rows get another layout for the product
        rows += config["BN"]
    shared = rows * config["BH"] * P * dtype.itemsize
    return gpu.programs(shared, config["num_warps"], registers=168 if gpu.is_hip else 128)


def few_rows_splits(P: int, N: int, H: int, dtype: torch.dtype, gpu: Gpu) -> tuple[int, int]:
    """The number of splits of the hidden dimension that fill the GPU once, and the steps of each."""
    config = few_rows_config(P, N, dtype, gpu)
    resident_programs = gpu.processors * few_rows_programs(P, N, dtype, gpu)
    blocks = cdiv(H, config["BH"])
    splits = max(1, min(blocks, resident_programs // cdiv(H, config["BJ"]), MAX_SPLITS))
    steps = cdiv(blocks, splits)
    return cdiv(blocks, steps), steps


def finish_config(P: int, H: int) -> dict[str, int]:
    """Block and warps of `finish_kernel`."""
    return {"BH": min(power_of_2(H), max(64, 4096 // power_of_2(P))), "num_warps": 8}


def join_config(P: int, H: int) -> dict[str, int]:
    """Block and warps of `join_kernel`."""
    return {"BH": min(power_of_2(H), max(16, 4096 // power_of_2(P))), "num_warps": 4}


def split_config(P: int) -> dict[str, int]:
    """Block and warps of `split_kernel`."""
    return {"BM": 4096 // power_of_2(P), "num_warps": 4}


def join_streams(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`(P, N, H)` -> `(N, H*P)` in `dtype`: all streams of a hidden feature are adjacent."""
    P, N, H = x.shape
    joined = torch.empty(N, H * P, dtype=dtype, device=x.device)
    config = join_config(P, H)
    grid = (N * cdiv(H, config["BH"]),)
    x = last_contiguous(x)
    launch(join_kernel, grid, x, joined, H, *x.stride()[:2], P=P, BP=power_of_2(P), **config)
    return joined


def split_streams(weight: torch.Tensor, P: int) -> torch.Tensor:
    """`(H, H*P)` -> `(P, H, H)`, by stream, output feature, hidden feature."""
    H = weight.shape[0]
    split = torch.empty(P, H, H, dtype=weight.dtype, device=weight.device)
    config = split_config(P)
    grid = (cdiv(H * H, config["BM"]),)
    launch(split_kernel, grid, weight.contiguous(), split, H * H, P=P, BP=power_of_2(P), **config)
    return split


def takes_few_rows(P: int, N: int, H: int) -> bool:
    """Whether `few_rows_kernel` computes the first projection: it needs loads of 16 bytes."""
    return N <= FEW_ROWS and power_of_2(P) == P and H % 16 == 0


def forward(
    x: torch.Tensor,
    weight1: torch.Tensor,
    bias1: torch.Tensor,
    weight2: torch.Tensor,
    bias2: torch.Tensor,
    smoothing: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`x (P, N, H)` -> mixed `(N, H)`; before SiLU `(N, H)` if `save`, else nothing; float32 logits `(N, P)`.

    Args:
        x: any strides.
        weight1: `(H, H*P)`.
        bias1: `(H,)`.
        weight2: `(P, H)`.
        bias2: `(P,)`.
        smoothing: epsilon.
        save: whether to save what a backward pass needs.
    """
    P, N, H = x.shape
    out = torch.empty(N, H, dtype=x.dtype, device=x.device)
    inner = torch.empty(N if save else 0, H, dtype=weight1.dtype, device=x.device)
    if N == 0 or H == 0:
        return out, inner, torch.zeros(N, P, dtype=torch.float32, device=x.device)
    x, gpu, few = last_contiguous(x), gpu_of(x.device), takes_few_rows(P, N, H)
    partial = _multiply_few(x, weight1, gpu) if few else _multiply(join_streams(x, weight1.dtype), weight1)[None]
    logits = torch.empty(N, P, dtype=torch.float32, device=x.device)
    early = few and gpu.dependent_launch
    launch(
        finish_kernel,
        (N,),
        *(x, partial, bias1.contiguous(), weight2.contiguous(), bias2.contiguous(), out, inner if save else None),
        *(logits, N, H, partial.shape[0], *x.stride()[:2]),
        SMOOTHING=smoothing,
        P=P,
        BP=power_of_2(P),
        EARLY=early,
        **finish_config(P, H),
        **dependent(early),
    )
    return out, inner, logits


def _multiply_few(x: torch.Tensor, weight: torch.Tensor, gpu: Gpu) -> torch.Tensor:
    """`x (P, N, H)`, `weight (H, H*P)` -> partial products, `(splits, N, H)`, float32."""
    P, N, H = x.shape
    config = few_rows_config(P, N, weight.dtype, gpu)
    splits, steps = few_rows_splits(P, N, H, weight.dtype, gpu)
    partial = torch.empty(splits, N, H, dtype=torch.float32, device=x.device)
    launch(
        few_rows_kernel,
        (cdiv(H, config["BJ"]), splits),
        *(x, weight.contiguous(), partial, N, H, steps, *x.stride()[:2]),
        P=P,
        EARLY=gpu.dependent_launch,
        DOT=operand(weight.dtype),
        **config,
    )
    return partial


def _multiply(joined: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`joined (N, H*P)`, `weight (H, H*P)` -> `(N, H)` in float32; on ROCm, rounded to their dtype."""
    with no_autocast(joined):
        if joined.dtype == torch.float32 or not joined.is_cuda:
            return joined.float() @ weight.float().T
        if gpu_of(joined.device).is_hip:
            return (joined @ weight.T).float()
        return torch.mm(joined, weight.T, out_dtype=torch.float32)


def backward(
    gradient: torch.Tensor,
    x: torch.Tensor,
    weight1: torch.Tensor,
    weight2: torch.Tensor,
    inner: torch.Tensor,
    logits: torch.Tensor,
    smoothing: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `x`, `weight1`, `bias1`, `weight2` and `bias2`; sums in fixed order, no atomics."""
    P, N, H = x.shape
    if N == 0:
        zeros = torch.zeros_like
        return torch.empty_like(x), zeros(weight1), weight1.new_zeros(H), zeros(weight2), weight2.new_zeros(P)
    dtype = weight1.dtype
    dx, dlogits = aggregate_fused.backward(gradient, x, logits, smoothing)  # (P, N, H), (N, P) float32
    with no_autocast(x):
        z = inner.float()
        sigmoid = torch.sigmoid(z)
        dz = (dlogits @ weight2.float()) * (sigmoid * (1 + z * (1 - sigmoid)))  # (N, H)
        dweight2 = dlogits.T @ (z * sigmoid)  # (P, H)
        dbias1, dbias2 = dz.sum(0), dlogits.sum(0)
        by_row = dz.to(dtype).expand(P, N, H)
        split = split_streams(weight1, P)  # (P, inner, hidden)
        if x.dtype == dtype:
            dx.baddbmm_(by_row, split)  # (P, N, inner) @ (P, inner, hidden)
        else:
            dx += torch.bmm(by_row, split)
        dweight1 = torch.bmm(by_row.transpose(1, 2), x.to(dtype))  # (P, inner, N) @ (P, N, hidden)
    dweight1 = join_streams(dweight1, dtype)  # (inner, hidden*P)
    return dx, dweight1, dbias1.to(dtype), dweight2.to(dtype), dbias2.to(dtype)


# As torch operators: torch.compile, CUDA graphs, autograd (once) and vmap; the second is not differentiable again.
aggregator_op = torch.library.custom_op("parscale::aggregator", mutates_args=())(forward)
aggregator_backward_op = torch.library.custom_op("parscale::aggregator_backward", mutates_args=())(backward)


@aggregator_op.register_fake
def _(x: torch.Tensor, weight1: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    P, N, H = x.shape
    save = rest[-1]
    return x.new_empty(N, H), weight1.new_empty(N if save else 0, H), x.new_empty(N, P, dtype=torch.float32)


@aggregator_backward_op.register_fake
def _(
    gradient: torch.Tensor, x: torch.Tensor, weight1: torch.Tensor, weight2: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, ...]:
    P, H = x.shape[0], x.shape[2]
    weights = (weight1.new_empty(H, H * P), weight1.new_empty(H), weight2.new_empty(P, H), weight2.new_empty(P))
    return x.new_empty(x.shape), *weights


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    x, weight1, _, weight2, _, ctx.smoothing, ctx.save = inputs
    _, inner, logits = output
    ctx.mark_non_differentiable(inner, logits)
    ctx.save_for_backward(x, weight1, weight2, inner, logits)


def _differentiate(ctx: Any, gradient: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if not ctx.save:
        raise RuntimeError("parscale::aggregator saved nothing for a backward pass; call it with save=True.")
    return *aggregator_backward_op(gradient, *ctx.saved_tensors, ctx.smoothing), None, None


aggregator_op.register_autograd(_differentiate, setup_context=_setup)


@aggregator_op.register_vmap
def _(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[Any, tuple[int, int, int]]:
    results = []
    for index in range(info.batch_size):
        one = (x if dim is None else x.select(dim, index) for x, dim in zip(args, dims, strict=True))
        results.append(aggregator_op(*one))
    return tuple(torch.stack(each) for each in zip(*results, strict=True)), (0, 0, 0)
