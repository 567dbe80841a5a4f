"""The aggregator's Triton kernels.

``b_x`` is a value, ``p_x`` a pointer, ``o_d`` an offset, ``m_d`` a mask, ``s_xd`` a stride; ``BN``, ``BJ``, ``BH``,
``BP`` are the sizes of blocks: rows, inner features, hidden features, streams. ``DOT`` is the type of factors.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def few_rows_kernel(
    p_x,
    p_weight,
    p_partial,
    N,
    H,
    steps,
    s_xp,
    s_xn,
    s_xh,
    P: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BJ: tl.constexpr,
    BH: tl.constexpr,
    DOT: tl.constexpr,
):
    """A part of the first projection's sum, ``(splits, N, H)``, for at most BN rows.

    ``weight (H, H*P)`` is read once, as it lies; the rows of ``x (P, N, H)``, far smaller, are put into its order on
    the way to the product. A program for each BJ inner features and each split of the hidden ones.
    """
    o_j = tl.program_id(0).to(tl.int64) * BJ + tl.arange(0, BJ)  # (BJ,)
    o_n = tl.arange(0, BN).to(tl.int64)  # (BN,)
    o_p = tl.arange(0, BP).to(tl.int64)  # (BP,)
    m_j, m_n, m_p = o_j < H, o_n < N, o_p < P
    b_sum = tl.zeros([BN, BJ], dtype=tl.float32)
    for step in range(steps):
        start = (tl.program_id(1).to(tl.int64) * steps + step) * BH
        o_h = start + tl.arange(0, BH)  # (BH,)
        m_h = o_h < H
        p_tile = p_x + o_n[:, None, None] * s_xn + o_h[None, :, None] * s_xh + o_p[None, None, :] * s_xp
        m_tile = m_n[:, None, None] & m_h[None, :, None] & m_p[None, None, :]
        b_x = tl.reshape(tl.load(p_tile, mask=m_tile, other=0.0), [BN, BH * BP])
        if P == BP:
            o_k = start * P + tl.arange(0, BH * BP)
            p_tile = p_weight + o_j[:, None] * (H * P) + o_k[None, :]
            b_weight = tl.load(p_tile, mask=m_j[:, None] & (o_k < H * P)[None, :], other=0.0)  # (BJ, BH*BP)
        else:
            p_tile = p_weight + o_j[:, None, None] * (H * P) + o_h[None, :, None] * P + o_p[None, None, :]
            m_tile = m_j[:, None, None] & m_h[None, :, None] & m_p[None, None, :]
            b_weight = tl.reshape(tl.load(p_tile, mask=m_tile, other=0.0), [BJ, BH * BP])
        b_sum = tl.dot(b_x.to(DOT), tl.trans(b_weight.to(DOT)), b_sum, input_precision="ieee")
    o_split = tl.program_id(1).to(tl.int64)
    p_tile = p_partial + (o_split * N + o_n[:, None]) * H + o_j[None, :]
    tl.store(p_tile, b_sum, mask=m_n[:, None] & m_j[None, :])


@triton.jit
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
    s_xh,
    SMOOTHING: tl.constexpr,
    SAVE: tl.constexpr,
    P: tl.constexpr,
    BP: tl.constexpr,
    BH: tl.constexpr,
):
    """The rest of the aggregator after :func:`few_rows_kernel`, a program for each row."""
    o_n = tl.program_id(0).to(tl.int64)
    o_p = tl.arange(0, BP).to(tl.int64)  # (BP,)
    m_p = o_p < P
    b_logits = tl.zeros([BP], dtype=tl.float32)
    for start in range(0, H, BH):
        o_h = start + tl.arange(0, BH).to(tl.int64)  # (BH,)
        m_h = o_h < H
        b_inner = tl.load(p_bias1 + o_h, mask=m_h, other=0.0).to(tl.float32)  # (BH,)
        for split in tl.range(0, splits, loop_unroll_factor=4):
            b_inner += tl.load(p_partial + (split * N + o_n) * H + o_h, mask=m_h, other=0.0)
        if SAVE:
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
        p_tile = p_x + o_p[:, None] * s_xp + o_n * s_xn + o_h[None, :] * s_xh
        b_x = tl.load(p_tile, mask=m_p[:, None] & m_h[None, :], other=0.0).to(tl.float32)  # (BP, BH)
        b_out = tl.sum(b_mix[:, None] * b_x, axis=0)  # (BH,)
        tl.store(p_out + o_n * H + o_h, b_out.to(p_out.dtype.element_ty), mask=m_h)


@triton.jit
def split_weight_kernel(
    p_weight,
    p_split,
    M,
    P: tl.constexpr,
    BP: tl.constexpr,
    BM: tl.constexpr,
):
    """``weight (M, P)`` -> ``(P, M)``: each stream's columns together."""
    o_m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)  # (BM,)
    o_p = tl.arange(0, BP).to(tl.int64)  # (BP,)
    m_m, m_p = o_m < M, o_p < P
    b_weight = tl.load(p_weight + o_m[:, None] * P + o_p[None, :], mask=m_m[:, None] & m_p[None, :], other=0.0)
    p_tile = p_split + o_p[:, None] * M + o_m[None, :]
    tl.store(p_tile, tl.trans(b_weight), mask=m_p[:, None] & m_m[None, :])


@triton.jit
def many_rows_kernel(
    p_x,
    p_weight,
    p_bias1,
    p_weight2,
    p_inner,
    p_partial,
    N,
    H,
    s_xp,
    s_xn,
    s_xh,
    P: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    BJ: tl.constexpr,
    BH: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN: tl.constexpr,
    SAVE: tl.constexpr,
    DOT: tl.constexpr,
):
    """The first projection, summed over the streams of ``x (P, N, H)`` in registers, SiLU, a part of the second one.

    ``weight (P, H, H)`` is stream-major. Writes ``inner (N, H)`` before SiLU if SAVE, and of the logits what each BJ
    inner features give, ``(ceil(H / BJ), N, P)``. Programs in groups of GROUP row blocks, which share weights in cache.
    """
    rows, columns = tl.cdiv(N, BN), tl.cdiv(H, BJ)
    group = tl.program_id(0) // (GROUP * columns)
    size = tl.minimum(rows - group * GROUP, GROUP)
    within = tl.program_id(0) % (GROUP * columns)
    block_n, block_j = group * GROUP + within % size, within // size

    o_n = block_n.to(tl.int64) * BN + tl.arange(0, BN)  # (BN,)
    o_j = block_j.to(tl.int64) * BJ + tl.arange(0, BJ)  # (BJ,)
    m_n, m_j = o_n < N, o_j < H
    p_rows = p_x + tl.minimum(o_n, N - 1)[:, None] * s_xn  # beyond the last row: the last row, and no mask
    p_columns = p_weight + tl.minimum(o_j, H - 1)[None, :] * H
    blocks = tl.cdiv(H, BH)
    size_p = tl.full([], 1, tl.int64) * H * H
    b_sum = tl.zeros([BN, BJ], dtype=tl.float32)
    for k in range(P * blocks):
        o_stream = (k // blocks).to(tl.int64)
        o_h = (k % blocks) * BH + tl.arange(0, BH).to(tl.int64)  # (BH,)
        p_left = p_rows + o_stream * s_xp + o_h[None, :] * s_xh
        p_right = p_columns + o_stream * size_p + o_h[:, None]
        if EVEN:
            b_x, b_weight = tl.load(p_left), tl.load(p_right)  # (BN, BH), (BH, BJ)
        else:
            m_h = o_h < H
            b_x = tl.load(p_left, mask=m_h[None, :], other=0.0)
            b_weight = tl.load(p_right, mask=m_h[:, None], other=0.0)
        b_sum = tl.dot(b_x.to(DOT), b_weight.to(DOT), b_sum, input_precision="ieee")

    b_inner = b_sum + tl.load(p_bias1 + o_j, mask=m_j, other=0.0).to(tl.float32)[None, :]  # (BN, BJ)
    if SAVE:
        p_tile = p_inner + o_n[:, None] * H + o_j[None, :]
        tl.store(p_tile, b_inner.to(p_inner.dtype.element_ty), mask=m_n[:, None] & m_j[None, :])
    b_inner = b_inner / (1 + tl.exp(-b_inner))
    o_p = tl.arange(0, BP).to(tl.int64)  # (BP,)
    m_tile = m_j[:, None] & (o_p < P)[None, :]
    b_weight = tl.load(p_weight2 + o_p[None, :] * H + o_j[:, None], mask=m_tile, other=0.0)  # (BJ, BP)
    b_logits = tl.dot(b_inner.to(DOT), b_weight.to(DOT), input_precision="ieee")  # (BN, BP)
    p_tile = p_partial + (block_j * N + o_n[:, None]) * P + o_p[None, :]
    tl.store(p_tile, b_logits, mask=m_n[:, None] & (o_p < P)[None, :])
