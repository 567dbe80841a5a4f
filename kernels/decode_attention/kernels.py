"""The Triton kernels of decode attention.

In kernels `b_x` is a value, `p_x` a pointer, `o_d` an offset, `m_d` a mask, `s_xd` a stride; a block has `BM` queries
of a head, `BT` tokens, `BD` elements of a key and `BV` of a value. Logarithms are to base 2. Tensors without strides
are contiguous. A pointer that is `None` means that an option is not used.

Shapes: R rows, B for each stream, stream-major; G key/value heads of n queries each; K cached tokens; T prefix tokens;
D, V sizes of a key and a value. S streams share the keys of a row: 1, if each has its own; otherwise all streams that
run, of which the first PLAIN have no prefix. A program treats them as S*n queries of one head.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _mask_block(p_mask, block, tokens, s_mh, n: tl.constexpr, BM: tl.constexpr, BT: tl.constexpr, HEADS: tl.constexpr):
    """One block of the mask, `(BM, BT)` if it differs by head, else `(BT,)`."""
    o_t = block * BT + tl.arange(0, BT).to(tl.int64)  # (BT,)
    m_t = o_t < tokens
    if HEADS:
        o_m = tl.arange(0, BM) % n
        b_mask = tl.load(p_mask + o_m[:, None] * s_mh + o_t[None, :], mask=m_t[None, :], other=0)
    else:
        b_mask = tl.load(p_mask + o_t, mask=m_t, other=0)
    return b_mask


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
    s_kt,
    s_vt,
    s_mh,
    b_max,
    b_sum,
    b_out,
    n: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LEAST: tl.constexpr,
    HEADS: tl.constexpr,
    OWN: tl.constexpr,
    SKIP: tl.constexpr,
    PLAIN: tl.constexpr,
    DOT: tl.constexpr,
):
    """Adds the blocks `first .. last` of one list of keys and values to a running softmax.

    With OWN, the list consists of runs of OWN tokens, with SKIP others between them in memory; each run is visible to
    one stream alone. Loads of keys and values depend only on `tokens`, so that they can run ahead of the products. The
    mask is applied to the scores: bytes, where 0 hides, if LEAST is `None`; otherwise numbers to add, where LEAST and
    below hide. Its next block is loaded while the current one is used.
    """
    BM: tl.constexpr = b_out.shape[0]
    BD: tl.constexpr = b_query.shape[1]
    BV: tl.constexpr = b_out.shape[1]
    o_d, o_v = tl.arange(0, BD), tl.arange(0, BV)
    if p_mask is not None:
        b_ahead = _mask_block(p_mask, first, tokens, s_mh, n, BM, BT, HEADS)
    for block in range(first, last):
        o_t = block * BT + tl.arange(0, BT).to(tl.int64)  # (BT,)
        m_t = o_t < tokens
        m_key, m_value = m_t[:, None], m_t[:, None]
        if D != BD:
            m_key = m_key & (o_d < D)[None, :]
        if V != BV:
            m_value = m_value & (o_v < V)[None, :]
        m_score = m_t[None, :]
        if OWN > 0:
            m_score = m_score & ((tl.arange(0, BM) // n)[:, None] == (PLAIN + o_t // OWN)[None, :])
            o_t += o_t // OWN * SKIP
        b_key = tl.load(p_key + o_t[:, None] * s_kt + o_d[None, :], mask=m_key, other=0.0)  # (BT, BD)
        b_value = tl.load(p_value + o_t[:, None] * s_vt + o_v[None, :], mask=m_value, other=0.0)  # (BT, BV)
        if p_mask is not None:
            b_mask = b_ahead if HEADS else b_ahead[None, :]
            b_ahead = _mask_block(p_mask, block + 1, tokens, s_mh, n, BM, BT, HEADS)
            if LEAST is None:
                m_score = m_score & (b_mask != 0)
            else:
                m_score = m_score & (b_mask.to(tl.float32) > LEAST)

        b_score = tl.dot(b_query, tl.trans(b_key.to(DOT)), input_precision="ieee") * scaling  # (BM, BT)
        if SOFTCAP is not None:
            b_score = SOFTCAP * (1 - 2 / (tl.exp(2 * b_score / SOFTCAP) + 1))  # tanh
        if p_mask is not None and LEAST is not None:
            b_score += b_mask.to(tl.float32)
        b_score = tl.where(m_score, b_score * 1.4426950408889634, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_score, axis=1))  # (BM,)
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_weight = tl.exp2(b_score - b_base[:, None])  # (BM, BT)
        b_scale = tl.exp2(b_max - b_base)
        b_sum = b_sum * b_scale + tl.sum(b_weight, axis=1)
        b_out = tl.dot(b_weight.to(DOT), b_value.to(DOT), b_out * b_scale[:, None], input_precision="ieee")
        b_max = b_new
    return b_max, b_sum, b_out


@triton.jit(do_not_specialize=["B", "K", "splits", "s_mr", "s_mh"], do_not_specialize_on_alignment=["p_mask"])
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
    p_lse,
    B,
    K,
    splits,
    scaling,
    s_kr,
    s_kg,
    s_kt,
    s_vr,
    s_vg,
    s_vt,
    s_mr,
    s_mh,
    G: tl.constexpr,
    n: tl.constexpr,
    S: tl.constexpr,
    PLAIN: tl.constexpr,
    T: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LEAST: tl.constexpr,
    MASKED_PREFIX: tl.constexpr,
    HEADS: tl.constexpr,
    LENGTHS: tl.constexpr,
    EARLY: tl.constexpr,
    DOT: tl.constexpr,
):
    """One split of one key/value head of one row of keys.

    Writes `out (R*G*n, splits, V)`; with several splits also their log-sum-exp, `lse (R*G*n, splits)`, for
    `merge_kernel`. `query` is `(R, G*n, D)`, `prefix_k` is `(P, G, T, D)` for the P streams that have a prefix. The
    mask covers the cache, or prefix and cache if MASKED_PREFIX, for each head if HEADS. `length` is one number, or one
    for each row if LENGTHS. With EARLY, the next kernel may start before this one has ended.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    BM: tl.constexpr = max(16, triton.next_power_of_2(S * n))
    BD: tl.constexpr = max(16, triton.next_power_of_2(D))
    BV: tl.constexpr = max(16, triton.next_power_of_2(V))
    o_row = (tl.program_id(0) // G).to(tl.int64)
    o_group = (tl.program_id(0) % G).to(tl.int64)
    o_prefix = o_group if S > 1 else (o_row // B) * G + o_group
    o_m, o_d, o_v = tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BV)
    o_head = (((o_m // n) * B + o_row) * G + o_group) * n + o_m % n  # (BM,)
    m_m = o_m < S * n
    p_tile = p_query + o_head[:, None] * D + o_d[None, :]
    b_query = tl.load(p_tile, mask=m_m[:, None] & (o_d < D)[None, :], other=0.0).to(DOT)  # (BM, BD)

    tokens = K
    if p_length is not None:
        tokens = tl.minimum(tl.load(p_length + o_row if LENGTHS else p_length).to(tl.int32), K)
    prefixes: tl.constexpr = (S - PLAIN) * T
    prefix_blocks: tl.constexpr = (prefixes + BT - 1) // BT
    blocks = prefix_blocks + tl.cdiv(tokens, BT)
    share = tl.cdiv(blocks, splits)
    first = tl.program_id(1) * share
    last = tl.minimum(first + share, blocks)

    b_max = tl.full([BM], float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros([BM], dtype=tl.float32)
    b_out = tl.zeros([BM, BV], dtype=tl.float32)
    p_ahead = p_mask
    if p_mask is not None:
        p_mask += o_row * s_mr
        if HEADS:
            p_mask += o_group * n * s_mh
        p_ahead = p_mask if MASKED_PREFIX else None
        if MASKED_PREFIX:
            p_mask += T
    b_max, b_sum, b_out = _attend(
        b_query,
        p_prefix_k + o_prefix * T * D,
        p_prefix_v + o_prefix * T * V,
        p_ahead,
        first,
        tl.minimum(last, prefix_blocks),
        prefixes,
        scaling,
        D,
        V,
        s_mh,
        b_max,
        b_sum,
        b_out,
        n,
        D,
        V,
        BT,
        SOFTCAP,
        LEAST,
        HEADS,
        T if S > 1 else 0,
        (G - 1) * T,
        PLAIN,
        DOT,
    )
    b_max, b_sum, b_out = _attend(
        b_query,
        p_key + o_row * s_kr + o_group * s_kg,
        p_value + o_row * s_vr + o_group * s_vg,
        p_mask,
        tl.maximum(first, prefix_blocks) - prefix_blocks,
        last - prefix_blocks,
        tokens,
        scaling,
        s_kt,
        s_vt,
        s_mh,
        b_max,
        b_sum,
        b_out,
        n,
        D,
        V,
        BT,
        SOFTCAP,
        LEAST,
        HEADS,
        0,
        0,
        0,
        DOT,
    )

    o_part = o_head * splits + tl.program_id(1)  # (BM,)
    b_divisor = b_sum
    if p_lse is not None:
        b_lse = tl.where(b_sum == 0, float("-inf"), b_max + tl.log2(tl.where(b_sum == 0, 1.0, b_sum)))
        tl.store(p_lse + o_part, b_lse, mask=m_m)
    elif p_sinks is not None:
        b_sink = tl.load(p_sinks + o_group * n + o_m % n, mask=m_m, other=0.0).to(tl.float32) * 1.4426950408889634
        b_new = tl.maximum(b_max, b_sink)
        b_scale = tl.exp2(b_max - b_new)
        b_divisor = b_sum * b_scale + tl.exp2(b_sink - b_new)
        b_out *= b_scale[:, None]
    b_out = b_out / tl.where(b_divisor == 0, 1.0, b_divisor)[:, None]
    p_tile = p_out + o_part[:, None] * V + o_v[None, :]
    tl.store(p_tile, b_out.to(p_out.dtype.element_ty), mask=m_m[:, None] & (o_v < V)[None, :])


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    p_parts,
    p_lse,
    p_sinks,
    p_out,
    splits,
    heads: tl.constexpr,
    V: tl.constexpr,
    BS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """`parts (R*heads, splits, V)`, weighted by `lse (R*heads, splits)` -> `out (R*heads, V)`; one program per row.

    Takes BS splits at a time. With EARLY, it starts before the parts are ready, and waits for them.
    """
    BV: tl.constexpr = triton.next_power_of_2(V)
    o_row = tl.program_id(0).to(tl.int64)
    o_s, o_v = tl.arange(0, BS), tl.arange(0, BV)
    b_sum = tl.full([], 0.0, tl.float32)
    b_max = tl.full([], float("-inf"), tl.float32)
    if p_sinks is not None:
        b_max = tl.load(p_sinks + o_row % heads).to(tl.float32) * 1.4426950408889634
        b_sum += 1.0
    b_out = tl.zeros([BV], dtype=tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for start in range(0, splits, BS):
        m_s = start + o_s < splits
        b_lse = tl.load(p_lse + o_row * splits + start + o_s, mask=m_s, other=float("-inf"))  # (BS,)
        p_tile = p_parts + (o_row * splits + start + o_s[:, None]) * V + o_v[None, :]
        b_parts = tl.load(p_tile, mask=m_s[:, None] & (o_v < V)[None, :], other=0.0)  # (BS, BV)
        b_new = tl.maximum(b_max, tl.max(b_lse, axis=0))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_weight = tl.exp2(b_lse - b_base)  # (BS,)
        b_scale = tl.exp2(b_max - b_base)
        b_sum = b_sum * b_scale + tl.sum(b_weight, axis=0)
        b_out = b_out * b_scale + tl.sum(b_parts * b_weight[:, None], axis=0)
        b_max = b_new
    b_out = b_out / tl.where(b_sum == 0, 1.0, b_sum)
    tl.store(p_out + o_row * V + o_v, b_out.to(p_out.dtype.element_ty), mask=o_v < V)
