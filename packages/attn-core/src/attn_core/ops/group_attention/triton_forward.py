# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# Kernels are Triton, not Python: constants stand where constexpr is declared, constant conditions decide what is bound.
"""Forward kernel of grouped attention, and the logits of one tile, which the backward kernels share.

Keys are read through a list of tokens sorted by group, in which every group starts at a tile of its own: a tile of BN
keys belongs to one group, its last slots may be holes (−1). TOKEN (b, tiles·BN) is that list, FIRST (b, G + 1) the
first tile of each group. So a program knows one group at a time, keeps one maximum and one sum, and any number of
groups fits the registers::

    group     0  0  0 | 1  1 | 2  2  2  2  2
    tiles    [0  0  0  .] [1  1  .  .] [2  2  2  2] [2  .  .  .]
"""

import triton
import triton.language as tl

from attn_core.kernels.tiles import (
    LN2,
    LOG2E,
    accumulate,
    load_rows,
    product,
    softmax_step,
    store_rows,
)


@triton.jit
def group_logits(
    s, scale2, BIAS, i0, ii, token, inside_i, inside_j, bias_n, bias_m, causal_offset, CAUSAL: tl.constexpr
):  # fmt: skip
    """Base-2 logits of a tile of dot products; ``ii`` and ``token`` orient it: (BM, 1) and (1, BN), or the transpose.

    BIAS points to row i0. Holes and, with CAUSAL, later keys are hidden.
    """
    s = s * scale2
    if BIAS is not None:
        bias = tl.load(BIAS + (ii * bias_n + token * bias_m), mask=inside_i & inside_j, other=0.0)
        s += bias.to(tl.float32) * LOG2E
    if CAUSAL:
        s = tl.where(inside_j & (token <= i0 + ii + causal_offset), s, float("-inf"))
    else:
        s = tl.where(inside_j, s, float("-inf"))
    return s


@triton.jit
def last_tile(TOKEN, first, end, i0, causal_offset, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr):
    """End of a group's tiles that the queries from i0 on may see: tokens ascend inside a group."""
    if CAUSAL:
        seen = first
        for t in range(first, end):
            seen += (tl.load(TOKEN + t * BN) < i0 + BM + causal_offset).to(tl.int32)
        end = seen
    return end


@triton.jit(do_not_specialize=["G", "causal_offset"])
def forward_kernel(
    Q, K, V, TOKEN, FIRST, FACTOR, BIAS,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, token_b, first_b,
    factor_b, factor_h, factor_n, factor_g, bias_b, bias_h, bias_n, bias_m,
    H, GROUP, N, G, scale2, causal_offset,
    OUT, LSE, o_b, o_h, o_n,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, WEIGHT: tl.constexpr, CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head, all groups one after another.

    FACTOR holds the groups' weights with WEIGHT, else their gates; None: the masses are the gates. LSE (B, H, N, G) is
    contiguous.
    """
    tiles = tl.cdiv(N, BM)
    tile = tl.program_id(0) % tiles
    if CAUSAL:  # the longest rows first, so that no program starts late and ends late
        tile = tiles - 1 - tile
    bh = tl.program_id(0) // tiles
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    i0 = tile * BM
    first = tl.cast(i0, tl.int64)
    ii = tl.arange(0, BM)
    c = tl.arange(0, BN)
    inside_i = i0 + ii < N
    q = load_rows(Q + (b * q_b + h * q_h + first * q_n), ii, q_n, inside_i, D, BLOCK_D, True)
    K += b * k_b + h // GROUP * k_h
    V += b * v_b + h // GROUP * v_h
    TOKEN += b * token_b
    FIRST += b * first_b
    LSE += ((b * H + h) * N + first) * G
    if FACTOR is not None:
        FACTOR += b * factor_b + h * factor_h + first * factor_n
    if BIAS is not None:
        BIAS += b * bias_b + h * bias_h + first * bias_n

    out = tl.zeros([BM, BLOCK_DV], tl.float32)
    out_m = tl.full([BM], float("-inf"), tl.float32)
    out_total = tl.zeros([BM], tl.float32)
    for g in range(G):
        start = tl.load(FIRST + g)
        end = last_tile(TOKEN, start, tl.load(FIRST + g + 1), i0, causal_offset, BM, BN, CAUSAL)
        m = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        acc = tl.zeros([BM, BLOCK_DV], tl.float32)
        for t in range(start, end):
            token = tl.load(TOKEN + t * BN + c).to(tl.int64)
            inside_j = token >= 0
            k = load_rows(K, token, k_n, inside_j, D, BLOCK_D, True)
            s = group_logits(
                product(q, tl.trans(k), UPCAST, PRECISION), scale2, BIAS,
                i0, ii[:, None], token[None, :], inside_i[:, None], inside_j[None, :],
                bias_n, bias_m, causal_offset, CAUSAL,
            )  # fmt: skip
            p, decay, m, total = softmax_step(s, m, total)
            v = load_rows(V, token, v_n, inside_j, DV, BLOCK_DV, True)
            acc = accumulate(p.to(v.dtype), v, acc * decay[:, None], UPCAST, PRECISION)
        dead = total == 0.0
        total = tl.where(dead, 1.0, total)
        mass = tl.where(dead, float("-inf"), m + tl.log2(total))
        tl.store(LSE + (ii * G + g), mass * LN2, mask=inside_i)
        if WEIGHT:
            weight = tl.load(FACTOR + (ii * factor_n + g * factor_g), mask=inside_i, other=0.0)
            out += acc * (tl.where(dead, 0.0, weight) / total)[:, None]
        else:
            gate = mass
            if FACTOR is not None:
                gate = tl.load(FACTOR + (ii * factor_n + g * factor_g), mask=inside_i, other=0.0) * LOG2E
                gate = tl.where(dead, float("-inf"), gate)
            m_new = tl.maximum(out_m, gate)
            # −inf − (−inf) would be NaN in rows that have seen no group yet.
            shift = tl.where(m_new == float("-inf"), 0.0, m_new)
            share = tl.exp2(gate - shift)
            decay = tl.exp2(out_m - shift)
            out = out * decay[:, None] + acc * (share / total)[:, None]
            out_total = out_total * decay + share
            out_m = m_new
    if not WEIGHT:
        out = out * (1.0 / tl.where(out_total == 0.0, 1.0, out_total))[:, None]
    store_rows(OUT + (b * o_b + h * o_h + first * o_n), ii, o_n, inside_i, out, DV, BLOCK_DV)
