# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# Kernels are Triton, not Python: constants stand where constexpr is declared, constant conditions decide what is bound.
"""Kernels of additive attention. A tile holds BM × BN pairs and walks the width one column at a time, so that every
column costs BM + BN loads and BM·BN evaluations, and no sum crosses threads before the tile is done.

tanh(z) = 1 − 2r, r = 1/(1 + e^{2z}), exact in float32 and saturating without NaN; tanh' = 4r(1 − r).
"""

import triton
import triton.language as tl

from attn_core.kernels.tiles import (
    LOG2E,
    accumulate,
    finish,
    load_lse,
    load_rows,
    product,
    softmax_step,
    store_rows,
)


@triton.jit
def column_sigmoid(Q, K, d, ii, jj, inside_i, inside_j, q_n, q_d, k_n, k_d):
    """r of the pairs of a tile in column ``d``; Q and K point to the tile's first query and key."""
    at = tl.cast(d, tl.int64)
    q = tl.load(Q + at * q_d + ii * q_n, mask=inside_i, other=0.0).to(tl.float32) * (2.0 * LOG2E)
    k = tl.load(K + at * k_d + jj * k_n, mask=inside_j, other=0.0).to(tl.float32) * (2.0 * LOG2E)
    # Beyond 2¹²⁶ r is 0 to float32's last bit of 1 − 2r; the limit keeps infinity out.
    return 1.0 / (1.0 + tl.exp2(tl.minimum(q[:, None] + k[None, :], 126.0)))


@triton.jit
def pair_scores(
    Q, K, W, MASK, ii, jj, inside_i, inside_j, q_n, q_d, k_n, k_d, w_d, mask_m, D,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Scores of a tile, −inf at hidden keys and at those outside."""
    s = tl.zeros([BM, BN], tl.float32)
    for d in range(D):
        w = tl.load(W + d * w_d).to(tl.float32)
        s += w - (2.0 * w) * column_sigmoid(Q, K, d, ii, jj, inside_i, inside_j, q_n, q_d, k_n, k_d)
    visible = inside_j
    if MASK is not None:
        visible = visible & (tl.load(MASK + jj * mask_m, mask=inside_j, other=0) != 0)
    return tl.where(visible[None, :], s, float("-inf"))


@triton.jit
def forward_kernel(
    Q, K, W, VALUE, MASK,
    q_b, q_n, q_d, k_b, k_n, k_d, w_b, w_d, v_b, v_n, mask_b, mask_m, N, M, D,
    OUT, LSE,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM queries and all keys. OUT is (B, N, E), or (B, N, M) for scores."""
    tiles = tl.cdiv(N, BM)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i0 = (tl.program_id(0) % tiles * BM).to(tl.int64)
    ii = tl.arange(0, BM)
    jj = tl.arange(0, BN)
    inside_i = i0 + ii < N
    Q += b * q_b + i0 * q_n
    W += b * w_b
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_E], tl.float32)
    for j0 in range(0, M, BN):
        first = tl.cast(j0, tl.int64)
        inside_j = j0 + jj < M
        s = pair_scores(
            Q, K + b * k_b + first * k_n, W, MASK + b * mask_b + first * mask_m if MASK is not None else None,
            ii, jj, inside_i, inside_j, q_n, q_d, k_n, k_d, w_d, mask_m, D, BM, BN,
        )  # fmt: skip
        if VALUE is None:
            pointers = OUT + (b * N + i0) * M + first + (ii[:, None] * M + jj[None, :])
            tl.store(pointers, s, mask=inside_i[:, None] & inside_j[None, :])
        p, decay, m, total = softmax_step(s * LOG2E, m, total)
        if VALUE is not None:
            v = load_rows(VALUE + b * v_b + first * v_n, jj, v_n, inside_j, E, BLOCK_E, True)
            acc = accumulate(p.to(v.dtype), v, acc * decay[:, None], UPCAST, PRECISION)
    out, lse = finish(acc, m, total)
    if VALUE is not None:
        store_rows(OUT + (b * N + i0) * E, ii, E, inside_i, out, E, BLOCK_E)
    tl.store(LSE + b * N + i0 + ii, lse, mask=inside_i)


@triton.jit
def tile_gradient(
    Q, K, W, VALUE, MASK, DO, SCORES, LSE, DELTA, ii, jj, inside_i, inside_j,
    q_n, q_d, k_n, k_d, w_d, v_n, mask_m, do_n, do_e, M, D,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(ds, p, do) of a tile to whose first elements the arguments point: ds = p(dp − δ), or dscores − pδ."""
    lse = load_lse(LSE + ii, inside_i)
    if VALUE is not None:
        s = pair_scores(
            Q, K, W, MASK, ii, jj, inside_i, inside_j, q_n, q_d, k_n, k_d, w_d, mask_m, D, BM, BN
        )  # fmt: skip
        p = tl.exp2(s * LOG2E - lse[:, None])
        v = load_rows(VALUE, jj, v_n, inside_j, E, BLOCK_E, True)
        do = load_rows(DO, ii, do_n, inside_i, E, BLOCK_E, True)
        delta = tl.load(DELTA + ii, mask=inside_i, other=0.0)
        ds = p * (product(do, tl.trans(v), UPCAST, PRECISION) - delta[:, None])
    else:
        inside = inside_i[:, None] & inside_j[None, :]
        if MASK is not None:
            inside = inside & (tl.load(MASK + jj * mask_m, mask=inside_j, other=0) != 0)[None, :]
        do = tl.load(DO + (ii[:, None] * do_n + jj[None, :] * do_e), mask=inside, other=0.0).to(tl.float32)
        ds = do
        p = do
        if DELTA is not None:
            s = tl.load(SCORES + (ii[:, None] * M + jj[None, :]), mask=inside, other=float("-inf")).to(tl.float32)
            p = tl.exp2(s * LOG2E - lse[:, None])
            ds -= p * tl.load(DELTA + ii, mask=inside_i, other=0.0)[:, None]
    return ds, p, do


@triton.jit
def query_kernel(
    Q, K, W, VALUE, MASK,
    q_b, q_n, q_d, k_b, k_n, k_d, w_b, w_d, v_b, v_n, mask_b, mask_m, N, M, D,
    DO, SCORES, LSE, DELTA, do_b, do_n, do_e, DQ, DW,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM queries and all keys. DQ (B, N, D) and DW (programs, D) are float32 and zeros at the start.

    Only this program adds to its rows, and one thread to each entry: additions without a wait for the old value, in a
    fixed order.
    """
    tiles = tl.cdiv(N, BM)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    i0 = (tl.program_id(0) % tiles * BM).to(tl.int64)
    ii = tl.arange(0, BM)
    jj = tl.arange(0, BN)
    inside_i = i0 + ii < N
    row = b * N + i0
    Q += b * q_b + i0 * q_n
    W += b * w_b
    DO += b * do_b + i0 * do_n
    if DW is not None:
        DW += tl.program_id(0).to(tl.int64) * D
    for j0 in range(0, M, BN):
        first = tl.cast(j0, tl.int64)
        inside_j = j0 + jj < M
        keys = K + b * k_b + first * k_n
        ds, _, _ = tile_gradient(
            Q, keys, W, VALUE + b * v_b + first * v_n if VALUE is not None else None,
            MASK + b * mask_b + first * mask_m if MASK is not None else None,
            DO if VALUE is not None else DO + first * do_e, SCORES + row * M + first, LSE + row,
            DELTA + row if DELTA is not None else None, ii, jj, inside_i, inside_j,
            q_n, q_d, k_n, k_d, w_d, v_n, mask_m, do_n, do_e, M, D, E, BLOCK_E, BM, BN, UPCAST, PRECISION,
        )  # fmt: skip
        for d in range(D):
            r = column_sigmoid(Q, keys, d, ii, jj, inside_i, inside_j, q_n, q_d, k_n, k_d)
            part = ds * r
            if DQ is not None:
                w = tl.load(W + d * w_d).to(tl.float32)
                dq = tl.sum(part * (1.0 - r), 1) * (4.0 * w)
                tl.atomic_add(DQ + row * D + (ii * D + d), dq, mask=inside_i, sem="relaxed")
            if DW is not None:
                tl.atomic_add(DW + d, tl.sum(tl.sum(ds - 2.0 * part, 1), 0), sem="relaxed")


@triton.jit
def key_kernel(
    Q, K, W, VALUE, MASK,
    q_b, q_n, q_d, k_b, k_n, k_d, w_b, w_d, v_b, v_n, mask_b, mask_m, N, M, D,
    DO, SCORES, LSE, DELTA, do_b, do_n, do_e, DK, DV,
    E: tl.constexpr, BLOCK_E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BN keys and all queries. DK (B, M, D) is float32 and zeros at the start, DV (B, M, E) is written."""
    tiles = tl.cdiv(M, BN)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    j0 = (tl.program_id(0) % tiles * BN).to(tl.int64)
    ii = tl.arange(0, BM)
    jj = tl.arange(0, BN)
    inside_j = j0 + jj < M
    K += b * k_b + j0 * k_n
    W += b * w_b
    if VALUE is not None:
        VALUE += b * v_b + j0 * v_n
    if MASK is not None:
        MASK += b * mask_b + j0 * mask_m
    dv = tl.zeros([BN, BLOCK_E], tl.float32)
    for i0 in range(0, N, BM):
        first = tl.cast(i0, tl.int64)
        inside_i = i0 + ii < N
        row = b * N + first
        queries = Q + b * q_b + first * q_n
        incoming = DO + b * do_b + first * do_n
        ds, p, do = tile_gradient(
            queries, K, W, VALUE, MASK, incoming if VALUE is not None else incoming + j0 * do_e, SCORES + row * M + j0,
            LSE + row, DELTA + row if DELTA is not None else None, ii, jj, inside_i, inside_j,
            q_n, q_d, k_n, k_d, w_d, v_n, mask_m, do_n, do_e, M, D, E, BLOCK_E, BM, BN, UPCAST, PRECISION,
        )  # fmt: skip
        if DV is not None:
            dv = accumulate(tl.trans(p).to(do.dtype), do, dv, UPCAST, PRECISION)
        if DK is not None:
            for d in range(D):
                r = column_sigmoid(queries, K, d, ii, jj, inside_i, inside_j, q_n, q_d, k_n, k_d)
                w = tl.load(W + d * w_d).to(tl.float32)
                dk = tl.sum(ds * r * (1.0 - r), 0) * (4.0 * w)
                tl.atomic_add(DK + (b * M + j0) * D + (jj * D + d), dk, mask=inside_j, sem="relaxed")
    if DV is not None:
        store_rows(DV + (b * M + j0) * E, jj, E, inside_j, dv, E, BLOCK_E)
