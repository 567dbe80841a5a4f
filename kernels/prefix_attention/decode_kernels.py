"""The Triton kernels of decode attention.

In kernels ``b_x`` is a value, ``p_x`` a pointer, ``o_d`` an offset, ``m_d`` a mask, ``s_xd`` a stride; ``BM`` queries
of a head, ``BT`` tokens, ``BD`` and ``BV`` numbers of a key and a value make a block. Logarithms are to base 2.

Shapes: R = P*B rows, stream-major; G key/value heads; K cached tokens; T prefix tokens; D, V sizes of key and value.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _attend(
    b_query,
    p_key,
    p_value,
    p_mask,
    first,
    last,
    tokens,
    scaling,
    softcap,
    least,
    s_kt,
    s_kd,
    s_vt,
    s_vd,
    s_mh,
    s_mk,
    b_max,
    b_sum,
    b_out,
    n: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    MASK: tl.constexpr,
    PER_HEAD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DOT: tl.constexpr,
):
    """Adds the blocks ``first .. last`` of one list of keys and values to a running softmax.

    MASK is 0 (none), 1 (bytes, 0 hides) or 2 (numbers to add, of which ``least`` and below hide).
    """
    o_m, o_d, o_v = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    for block in range(first, last):
        o_t = block * BT + tl.arange(0, BT).to(tl.int64)  # (BT,)
        m_t = o_t < tokens
        m_score = m_t[None, :]
        if MASK > 0:
            if PER_HEAD:
                p_tile = p_mask + o_m[:, None] * s_mh + o_t[None, :] * s_mk
                b_mask = tl.load(p_tile, mask=(o_m < n)[:, None] & m_t[None, :], other=0.0).to(tl.float32)  # (BM, BT)
            else:
                b_mask = tl.load(p_mask + o_t * s_mk, mask=m_t, other=0.0).to(tl.float32)[None, :]  # (1, BT)
            if MASK == 1:
                m_score = m_score & (b_mask != 0)
            else:
                m_score = m_score & (b_mask > least)
            if PER_HEAD:
                m_score = m_score & (o_m < n)[:, None]
            m_t = tl.max(m_score.to(tl.int32), axis=0) > 0
        m_key, m_value = m_t[:, None], m_t[:, None]
        if D != BD:
            m_key = m_key & (o_d < D)[None, :]
        if V != BV:
            m_value = m_value & (o_v < V)[None, :]
        b_key = tl.load(p_key + o_t[:, None] * s_kt + o_d[None, :] * s_kd, mask=m_key, other=0.0)  # (BT, BD)
        b_score = tl.dot(b_query, tl.trans(b_key.to(DOT)), input_precision="ieee") * scaling  # (BM, BT)
        if SOFTCAP:
            b_score = softcap * (1 - 2 / (tl.exp(2 * b_score / softcap) + 1))  # of tanh
        if MASK == 2:
            b_score += b_mask
        b_score = tl.where(m_score, b_score * 1.4426950408889634, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_score, axis=1))  # (BM,)
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_weight = tl.exp2(b_score - b_base[:, None])  # (BM, BT)
        b_scale = tl.exp2(b_max - b_base)
        b_sum = b_sum * b_scale + tl.sum(b_weight, axis=1)
        b_value = tl.load(p_value + o_t[:, None] * s_vt + o_v[None, :] * s_vd, mask=m_value, other=0.0)  # (BT, BV)
        b_out = tl.dot(b_weight.to(DOT), b_value.to(DOT), b_out * b_scale[:, None], input_precision="ieee")
        b_max = b_new
    return b_max, b_sum, b_out


@triton.jit
def part_kernel(
    p_query,
    p_key,
    p_value,
    p_prefix_k,
    p_prefix_v,
    p_mask,
    p_length,
    p_sinks,
    p_out,
    p_parts,
    p_lse,
    B,
    G,
    K,
    splits,
    scaling,
    softcap,
    least,
    s_qr,
    s_qh,
    s_qd,
    s_kr,
    s_kg,
    s_kt,
    s_kd,
    s_vr,
    s_vg,
    s_vt,
    s_vd,
    s_pkp,
    s_pkg,
    s_pkt,
    s_pkd,
    s_pvp,
    s_pvg,
    s_pvt,
    s_pvd,
    s_mr,
    s_mh,
    s_mk,
    s_length,
    n: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BM: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    MASK: tl.constexpr,
    MASKED_PREFIX: tl.constexpr,
    PER_HEAD: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    LENGTH: tl.constexpr,
    WHOLE: tl.constexpr,
    DOT: tl.constexpr,
):
    """One split of one key/value head of one row: ``out`` if it is the only one, else ``parts`` and ``lse``."""
    o_row = (tl.program_id(0) // G).to(tl.int64)
    o_group = (tl.program_id(0) % G).to(tl.int64)
    o_stream = o_row // B
    o_m, o_d, o_v = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    o_head = o_group * n + o_m  # (BM,)
    m_m = o_m < n
    p_tile = p_query + o_row * s_qr + o_head[:, None] * s_qh + o_d[None, :] * s_qd
    b_query = tl.load(p_tile, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0).to(DOT)  # (BM, BD)

    tokens = K
    if LENGTH:
        tokens = tl.minimum(tl.load(p_length + o_row * s_length).to(tl.int32), K)
    prefix_blocks: tl.constexpr = (T + BT - 1) // BT
    blocks = prefix_blocks + tl.cdiv(tokens, BT)
    share = tl.cdiv(blocks, splits)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, blocks)

    b_max = tl.full([BM], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BM], dtype=tl.float32)
    b_out = tl.zeros([BM, BV], dtype=tl.float32)
    p_mask += o_row * s_mr + o_group * n * s_mh
    b_max, b_sum, b_out = _attend(
        b_query,
        p_prefix_k + o_stream * s_pkp + o_group * s_pkg,
        p_prefix_v + o_stream * s_pvp + o_group * s_pvg,
        p_mask,
        first,
        tl.minimum(last, prefix_blocks),
        T,
        scaling,
        softcap,
        least,
        s_pkt,
        s_pkd,
        s_pvt,
        s_pvd,
        s_mh,
        s_mk,
        b_max,
        b_sum,
        b_out,
        n,
        D,
        V,
        BM,
        BT,
        BD,
        BV,
        MASK if MASKED_PREFIX else 0,
        PER_HEAD,
        SOFTCAP,
        DOT,
    )
    if MASKED_PREFIX:
        p_mask += T * s_mk
    b_max, b_sum, b_out = _attend(
        b_query,
        p_key + o_row * s_kr + o_group * s_kg,
        p_value + o_row * s_vr + o_group * s_vg,
        p_mask,
        tl.maximum(first, prefix_blocks) - prefix_blocks,
        last - prefix_blocks,
        tokens,
        scaling,
        softcap,
        least,
        s_kt,
        s_kd,
        s_vt,
        s_vd,
        s_mh,
        s_mk,
        b_max,
        b_sum,
        b_out,
        n,
        D,
        V,
        BM,
        BT,
        BD,
        BV,
        MASK,
        PER_HEAD,
        SOFTCAP,
        DOT,
    )

    b_divisor = b_sum
    if SINKS and WHOLE:
        b_sink = tl.load(p_sinks + o_head, mask=m_m, other=0.0).to(tl.float32) * 1.4426950408889634
        b_new = tl.maximum(b_max, b_sink)
        b_scale = tl.exp2(b_max - b_new)
        b_divisor = b_sum * b_scale + tl.exp2(b_sink - b_new)
        b_out *= b_scale[:, None]
    b_out = b_out / tl.where(b_divisor == 0, 1.0, b_divisor)[:, None]
    heads = G * n
    m_out = m_m[:, None] & (o_v < V)[None, :]
    if WHOLE:
        p_tile = p_out + (o_row * heads + o_head[:, None]) * V + o_v[None, :]
        tl.store(p_tile, b_out.to(p_out.dtype.element_ty), mask=m_out)
    else:
        o_part = (o_row * heads + o_head) * splits + tl.program_id(1)
        tl.store(p_parts + o_part[:, None] * V + o_v[None, :], b_out, mask=m_out)
        b_lse = tl.where(b_sum == 0, float("-inf"), b_max + tl.log2(tl.where(b_sum == 0, 1.0, b_sum)))
        tl.store(p_lse + o_part, b_lse, mask=m_m)


@triton.jit
def merge_kernel(
    p_parts,
    p_lse,
    p_sinks,
    p_out,
    heads,
    splits,
    V: tl.constexpr,
    BS: tl.constexpr,
    BV: tl.constexpr,
    SINKS: tl.constexpr,
):
    """``parts (R*heads, splits, V)`` weighed by ``lse (R*heads, splits)`` -> ``out (R*heads, V)``; a program a row."""
    o_row = tl.program_id(0).to(tl.int64)
    o_s, o_v = tl.arange(0, BS), tl.arange(0, BV)
    m_s, m_v = o_s < splits, o_v < V
    b_lse = tl.load(p_lse + o_row * splits + o_s, mask=m_s, other=float("-inf"))  # (BS,)
    b_max = tl.max(b_lse, axis=0)
    if SINKS:
        b_sink = tl.load(p_sinks + o_row % heads).to(tl.float32) * 1.4426950408889634
        b_max = tl.maximum(b_max, b_sink)
    b_max = tl.where(b_max == float("-inf"), 0.0, b_max)
    b_weight = tl.exp2(b_lse - b_max)  # (BS,)
    b_sum = tl.sum(b_weight, axis=0)
    if SINKS:
        b_sum += tl.exp2(b_sink - b_max)
    p_tile = p_parts + (o_row * splits + o_s[:, None]) * V + o_v[None, :]
    b_parts = tl.load(p_tile, mask=m_s[:, None] & m_v[None, :], other=0.0)  # (BS, BV)
    b_out = tl.sum(b_parts * b_weight[:, None], axis=0) / tl.where(b_sum == 0, 1.0, b_sum)
    tl.store(p_out + o_row * V + o_v, b_out.to(p_out.dtype.element_ty), mask=m_v)
