"""The weighted sum over streams in Triton: forward, backward, and their registration with torch.

Reading order: forward kernel, backward kernel, host functions, operators. In kernels `b_x` is a value, `p_x` a pointer,
`o_d` an offset, `m_d` a mask, `s_xd` a stride; `BN`, `BP`, `BH` are block sizes. Tensors without strides are
contiguous; the last dimension of `x (P, N, H)` is, too.

Each program of the forward pass loads each of its elements once. Each program of the backward pass holds a whole row,
so the gradient of the logits, a sum over H, needs neither atomics nor a second pass.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from parscale.kernels.launch import accumulator, cdiv, last_contiguous, launch, power_of_2


@triton.jit(do_not_specialize=["N"])
def forward_kernel(
    p_x,
    p_logits,
    p_out,
    N,
    H,
    s_xp,
    s_xn,
    SMOOTHING: tl.constexpr,
    P: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BH: tl.constexpr,
    ACC: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """`x (P, N, H)`, `logits (N, P)` -> `out (N, H)`, contiguous; a program for each BN x BH of it."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)  # (BN,)
    o_h = tl.program_id(1).to(tl.int64) * BH + tl.arange(0, BH)  # (BH,)
    o_p = tl.arange(0, BP).to(tl.int64)  # (BP,)
    m_n, m_h = o_n < N, o_h < H
    m_tile = m_n[:, None] & m_h[None, :]  # (BN, BH)

    m_logits = m_n[:, None] & (o_p < P)[None, :]
    b_logits = tl.load(p_logits + o_n[:, None] * P + o_p[None, :], mask=m_logits, other=0.0).to(ACC)
    b_logits = tl.where((o_p < P)[None, :], b_logits, float("-inf"))  # (BN, BP)
    b_max = tl.max(b_logits, axis=1)  # (BN,)
    b_sum = tl.sum(tl.exp(b_logits - b_max[:, None]), axis=1)  # (BN,)

    b_out = tl.zeros([BN, BH], dtype=ACC)
    p_tile = p_x + o_n[:, None] * s_xn + o_h[None, :]
    for p in tl.range(0, P, loop_unroll_factor=UNROLL):
        o_stream = tl.full([], 0, tl.int64) + p
        b_logit = tl.load(p_logits + o_n * P + p, mask=m_n, other=0.0).to(ACC)  # (BN,)
        b_weight = tl.exp(b_logit - b_max) / b_sum * (1 - SMOOTHING) + SMOOTHING / P
        b_x = tl.load(p_tile + o_stream * s_xp, mask=m_tile, other=0.0).to(ACC)  # (BN, BH)
        b_out += b_weight[:, None] * b_x
    tl.store(p_out + o_n[:, None] * H + o_h[None, :], b_out.to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit(do_not_specialize=["N"])
def backward_kernel(
    p_gradient,
    p_x,
    p_logits,
    p_dx,
    p_dlogits,
    N,
    H,
    s_xp,
    s_xn,
    SMOOTHING: tl.constexpr,
    P: tl.constexpr,
    BP: tl.constexpr,
    BH: tl.constexpr,
    ACC: tl.constexpr,
):
    """`gradient (N, H)` -> `dx (P, N, H)`, `dlogits (N, P)`, contiguous; a program for each row."""
    o_n = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BP).to(tl.int64)  # (BP,)
    m_p = o_p < P
    b_logits = tl.load(p_logits + o_n * P + o_p, mask=m_p, other=float("-inf")).to(ACC)  # (BP,)
    b_exp = tl.exp(b_logits - tl.max(b_logits, axis=0))
    b_softmax = b_exp / tl.sum(b_exp, axis=0)
    b_weight = b_softmax * (1 - SMOOTHING) + SMOOTHING / P  # (BP,)

    b_product = tl.zeros([BP, BH], dtype=ACC)
    for start in range(0, H, BH):
        o_h = start + tl.arange(0, BH).to(tl.int64)  # (BH,)
        m_h = o_h < H
        m_tile = m_p[:, None] & m_h[None, :]  # (BP, BH)
        b_gradient = tl.load(p_gradient + o_n * H + o_h, mask=m_h, other=0.0).to(ACC)  # (BH,)
        p_tile = p_x + o_p[:, None] * s_xp + o_n * s_xn + o_h[None, :]
        b_x = tl.load(p_tile, mask=m_tile, other=0.0).to(ACC)  # (BP, BH)
        b_product += b_x * b_gradient[None, :]
        b_dx = b_weight[:, None] * b_gradient[None, :]
        p_tile = p_dx + (o_p[:, None] * N + o_n) * H + o_h[None, :]
        tl.store(p_tile, b_dx.to(p_dx.dtype.element_ty), mask=m_tile)
    b_dweight = tl.sum(b_product, axis=1)  # (BP,)
    b_dot = tl.sum(tl.where(m_p, b_softmax * b_dweight, 0.0), axis=0)
    b_dlogits = (1 - SMOOTHING) * b_softmax * (b_dweight - b_dot)
    tl.store(p_dlogits + o_n * P + o_p, b_dlogits.to(p_dlogits.dtype.element_ty), mask=m_p)


def forward_config(P: int, H: int, dtype: torch.dtype) -> dict[str, int]:
    """Blocks and warps of `forward_kernel`: the same for any number of rows."""
    BH = min(512, max(128, power_of_2(H)))
    double = dtype == torch.float64
    BN = max(1, (1024 if double else 2048) // BH)
    return {"BN": BN, "BH": BH, "UNROLL": min(P, 2 if double else 8), "num_warps": 4}


def backward_config(P: int, H: int, dtype: torch.dtype) -> dict[str, int]:
    """Blocks and warps of `backward_kernel`."""
    tile = 4096 if dtype.itemsize == 2 else 2048  # elements that a program holds
    return {"BH": min(power_of_2(H), tile // power_of_2(P)), "num_warps": 4}


def forward(x: torch.Tensor, logits: torch.Tensor, smoothing: float) -> torch.Tensor:
    """`x (P, N, H)`, `logits (N, P)` -> `(N, H)`; any strides."""
    P, N, H = x.shape
    out = torch.empty(N, H, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    x, config = last_contiguous(x), forward_config(P, H, x.dtype)
    launch(
        forward_kernel,
        (cdiv(N, config["BN"]), cdiv(H, config["BH"])),
        *(x, logits.contiguous(), out, N, H, *x.stride()[:2]),
        SMOOTHING=smoothing,
        P=P,
        BP=power_of_2(P),
        ACC=accumulator(x.dtype),
        **config,
    )
    return out


def backward(
    gradient: torch.Tensor, x: torch.Tensor, logits: torch.Tensor, smoothing: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gradient (N, H)` -> gradients of `x (P, N, H)` and `logits (N, P)`; any strides."""
    P, N, H = x.shape
    dx = torch.empty(P, N, H, dtype=x.dtype, device=x.device)
    dlogits = torch.empty(N, P, dtype=logits.dtype, device=x.device)
    if N == 0:
        return dx, dlogits
    x = last_contiguous(x)
    launch(
        backward_kernel,
        (N,),
        *(gradient.contiguous(), x, logits.contiguous(), dx, dlogits, N, H, *x.stride()[:2]),
        SMOOTHING=smoothing,
        P=P,
        BP=power_of_2(P),
        ACC=accumulator(x.dtype),
        **backward_config(P, H, x.dtype),
    )
    return dx, dlogits


# As torch operators: torch.compile, CUDA graphs, autograd (once) and vmap; the second is not differentiable again.
aggregate_op = torch.library.custom_op("parscale::aggregate", mutates_args=())(forward)
aggregate_backward_op = torch.library.custom_op("parscale::aggregate_backward", mutates_args=())(backward)


@aggregate_op.register_fake
def _(x: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(x.shape[1:])


@aggregate_backward_op.register_fake
def _(gradient: torch.Tensor, x: torch.Tensor, logits: torch.Tensor, _: float) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: object) -> None:
    x, logits, ctx.smoothing = inputs
    ctx.save_for_backward(x, logits)


def _differentiate(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
    dx, dlogits = aggregate_backward_op(gradient, *ctx.saved_tensors, ctx.smoothing)
    return dx, dlogits, None


aggregate_op.register_autograd(_differentiate, setup_context=_setup)


def _rows(x: torch.Tensor, dim: int | None, size: int, row_dim: int) -> torch.Tensor:
    """Moves the mapped dimension before that of the rows: a copy only where the strides require one."""
    x = x.unsqueeze(0).expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.movedim(0, row_dim).flatten(row_dim, row_dim + 1)


@aggregate_op.register_vmap
def _(info: Any, dims: tuple[Any, ...], x: torch.Tensor, logits: torch.Tensor, smoothing: float) -> tuple[Any, int]:
    x, logits = _rows(x, dims[0], info.batch_size, 1), _rows(logits, dims[1], info.batch_size, 0)
    return aggregate_op(x, logits, smoothing).unflatten(0, (info.batch_size, -1)), 0


@aggregate_backward_op.register_vmap
def _(
    info: Any, dims: tuple[Any, ...], gradient: torch.Tensor, x: torch.Tensor, logits: torch.Tensor, smoothing: float
) -> tuple[Any, Any]:
    size = info.batch_size
    rows = (_rows(gradient, dims[0], size, 0), _rows(x, dims[1], size, 1), _rows(logits, dims[2], size, 0))
    dx, dlogits = aggregate_backward_op(*rows, smoothing)
    return (dx.unflatten(1, (size, -1)), dlogits.unflatten(0, (size, -1))), (1, 0)
