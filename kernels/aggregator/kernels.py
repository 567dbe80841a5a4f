"""The aggregator's Triton kernels.

`b_x` is a value, `p_x` a pointer, `o_d` an offset, `m_d` a mask, `s_xd` a stride; `BN`, `BJ`, `BH`, `BP` are block
sizes: rows, inner features, hidden features, streams. `DOT` is the type of the factors. Tensors without strides are
contiguous; the last dimension of `x (P, N, H)` is, too.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N", "steps"])
def few_rows_kernel(
    p_x,
    p_weight,
    p_partial,
    N,
    H,
    steps,
    s_xp,
    s_xn,
    P: tl.constexpr,
    BN: tl.constexpr,
    BJ: tl.constexpr,
    BH: tl.constexpr,
    EARLY: tl.constexpr,
    DOT: tl.constexpr,
):
    """A partial sum of the first projection, `(splits, N, H)`, for at most BN rows; P is a power of 2.

    `weight (H, H*P)` is read once, in its memory layout; the rows of `x`, which are far smaller, are reordered to match
    it. There is one program for each BJ inner features and each split of the hidden ones. With EARLY, the next kernel
    may start before this one has ended.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    o_j = tl.program_id(0).to(tl.int64) * BJ + tl.arange(0, BJ)  # (BJ,)
    o_n, o_p = tl.arange(0, BN).to(tl.int64), tl.arange(0, P).to(tl.int64)
    m_j, m_n = o_j < H, o_n < N
    b_sum = tl.zeros([BN, BJ], dtype=tl.float32)
    for step in range(steps):
        start = (tl.program_id(1).to(tl.int64) * steps + step) * BH
        o_h = start + tl.arange(0, BH)  # (BH,)
        p_tile = p_x + o_n[:, None, None] * s_xn + o_h[None, :, None] + o_p[None, None, :] * s_xp
        b_x = tl.load(p_tile, mask=m_n[:, None, None] & (o_h < H)[None, :, None], other=0.0)  # (BN, BH, P)
        o_k = start * P + tl.arange(0, BH * P)
        p_tile = p_weight + o_j[:, None] * (H * P) + o_k[None, :]
        b_weight = tl.load(p_tile, mask=m_j[:, None] & (o_k < H * P)[None, :], other=0.0)  # (BJ, BH*P)
        b_x = tl.reshape(b_x, [BN, BH * P])
        b_sum = tl.dot(b_x.to(DOT), tl.trans(b_weight.to(DOT)), b_sum, input_precision="ieee")
    o_split = tl.program_id(1).to(tl.int64)
    p_tile = p_partial + (o_split * N + o_n[:, None]) * H + o_j[None, :]
    tl.store(p_tile, b_sum, mask=m_n[:, None] & m_j[None, :])


@triton.jit(do_not_specialize=["N", "splits"])
def finish_kernel(
    p_x,
    p_partial,
    p_bias1,
    p_weight2,
    p_bias2,
    p_out,
    p_inner,
    p_logits,
    N,
    H,
    splits,
    s_xp,
    s_xn,
    SMOOTHING: tl.constexpr,
    P: tl.constexpr,
    BP: tl.constexpr,
    BH: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The rest of the aggregator, one program for each row: from the partial sums of the first projection to `out`.

    `partial (splits, N, H)` in float32, `out (N, H)`, `logits (N, P)`; `inner (N, H)`, before SiLU, unless it is
    `None`. With EARLY, it starts before the partial sums are ready, and waits for them.
    """
    o_n = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BP).to(tl.int64)  # (BP,)
    m_p = o_p < P
    b_logits = tl.zeros([BP], dtype=tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for start in range(0, H, BH):
        o_h = start + tl.arange(0, BH).to(tl.int64)  # (BH,)
        m_h = o_h < H
        b_inner = tl.load(p_bias1 + o_h, mask=m_h, other=0.0).to(tl.float32)  # (BH,)
        for split in tl.range(0, splits, loop_unroll_factor=4):
            b_inner += tl.load(p_partial + (split * N + o_n) * H + o_h, mask=m_h, other=0.0)
        if p_inner is not None:
            tl.store(p_inner + o_n * H + o_h, b_inner.to(p_inner.dtype.element_ty), mask=m_h)
        b_inner = b_inner / (1 + tl.exp(-b_inner))
        m_tile = m_p[:, None] & m_h[None, :]
        b_weight = tl.load(p_weight2 + o_p[:, None] * H + o_h[None, :], mask=m_tile, other=0.0).to(tl.float32)
        b_logits += tl.sum(b_weight * b_inner[None, :], axis=1)  # (BP, BH) -> (BP,)
    b_logits += tl.load(p_bias2 + o_p, mask=m_p, other=0.0).to(tl.float32)
    tl.store(p_logits + o_n * P + o_p, b_logits, mask=m_p)

    b_logits = tl.where(m_p, b_logits, float("-inf"))
    b_exp = tl.exp(b_logits - tl.max(b_logits, axis=0))
    b_mix = b_exp / tl.sum(b_exp, axis=0) * (1 - SMOOTHING) + SMOOTHING / P  # (BP,)
    b_mix = tl.where(m_p, b_mix, 0.0)
    for start in range(0, H, BH):
        o_h = start + tl.arange(0, BH).to(tl.int64)
        m_h = o_h < H
        p_tile = p_x + o_p[:, None] * s_xp + o_n * s_xn + o_h[None, :]
        b_x = tl.load(p_tile, mask=m_p[:, None] & m_h[None, :], other=0.0).to(tl.float32)  # (BP, BH)
        b_out = tl.sum(b_mix[:, None] * b_x, axis=0)  # (BH,)
        tl.store(p_out + o_n * H + o_h, b_out.to(p_out.dtype.element_ty), mask=m_h)


@triton.jit
def join_kernel(
    p_x,
    p_joined,
    H,
    s_xp,
    s_xn,
    P: tl.constexpr,
    BP: tl.constexpr,
    BH: tl.constexpr,
):
    """`x (P, N, H)` -> `(N, H, P)`, in the order of the first projection's weight; one program for BH of a row."""
    blocks = tl.cdiv(H, BH)
    o_n = (tl.program_id(0) // blocks).to(tl.int64)
    o_h = (tl.program_id(0) % blocks).to(tl.int64) * BH + tl.arange(0, BH)  # (BH,)
    o_p = tl.arange(0, BP).to(tl.int64)  # (BP,)
    m_h, m_p = o_h < H, o_p < P
    p_tile = p_x + o_p[:, None] * s_xp + o_n * s_xn + o_h[None, :]
    b_x = tl.load(p_tile, mask=m_p[:, None] & m_h[None, :], other=0.0)  # (BP, BH)
    p_tile = p_joined + (o_n * H + o_h[:, None]) * P + o_p[None, :]
    tl.store(p_tile, tl.trans(b_x).to(p_joined.dtype.element_ty), mask=m_h[:, None] & m_p[None, :])


@triton.jit
def split_kernel(
    p_weight,
    p_split,
    M,
    P: tl.constexpr,
    BP: tl.constexpr,
    BM: tl.constexpr,
):
    """`weight (M, P)` -> `(P, M)`: the columns of each stream become contiguous."""
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # (BM,)
    o_p = tl.arange(0, BP).to(tl.int64)  # (BP,)
    m_m, m_p = o_m < M, o_p < P
    b_weight = tl.load(p_weight + o_m[:, None] * P + o_p[None, :], mask=m_m[:, None] & m_p[None, :], other=0.0)
    p_tile = p_split + o_p[:, None] * M + o_m[None, :]
    tl.store(p_tile, tl.trans(b_weight), mask=m_p[:, None] & m_m[None, :])
