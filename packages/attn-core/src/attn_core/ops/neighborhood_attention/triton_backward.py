# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false, reportOperatorIssue=false
# Kernels are Triton, not Python: constants stand where constexpr is declared, constant conditions decide what is bound.
"""Backward kernels of neighborhood attention; boxes and argument names as in :mod:`.triton_forward`.

P = exp(s − lse); dS = P∘(dO Vᵀ − δ). One pass owns queries (dQ, and dS summed by relative position), one owns keys (dK
and dV): it walks the box of queries that may see its box of keys.
"""

import triton
import triton.language as tl

from attn_core.kernels.tiles import accumulate, load_lse, load_rows, product, store_rows

from .triton_forward import COUNTS, cells, logits, onlookers, relative, seen, tile_of, token, window


@triton.jit(do_not_specialize=COUNTS)
def query_kernel(
    Q, K, V, RPB,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, rpb_b, rpb_h,
    H, N, L0, L1, L2, K0, K1, K2, D0, D1, D2, S0, S1, S2, TILES0, TILES1, TILES2, scale2,
    DO, LSE, DELTA, do_b, do_h, do_n, scale,
    DQ, DRPB, dq_b, dq_h, dq_n, R,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr,
    AXES: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, SHIFTED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dQ of a box of queries; its share of the bias gradient in a row of its own of DRPB (programs, R)."""
    tiles = TILES0 * TILES1 * TILES2
    bh = tl.program_id(0) // tiles
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    r0, r1, r2, n0, n1, n2, p0, p1, p2 = tile_of(
        tl.program_id(0) % tiles, TILES1, TILES2, D0, D1, D2, L0, L1, L2, T0, T1, T2
    )
    i0, i1, i2 = cells(tl.arange(0, BM), T1, T2)
    inside = (p0 + i0 < n0) & (p1 + i1 < n1) & (p2 + i2 < n2)
    i0, i1, i2 = tl.minimum(p0 + i0, n0 - 1), tl.minimum(p1 + i1, n1 - 1), tl.minimum(p2 + i2, n2 - 1)
    f0, l0 = window(i0, n0, K0, S0, C0, SHIFTED)
    f1, l1 = window(i1, n1, K1, S1, C1, SHIFTED)
    f2, l2 = window(i2, n2, K2, S2, C2, SHIFTED)
    low0, low1, low2 = tl.min(f0, 0), tl.min(f1, 0), tl.min(f2, 0)
    w1, w2 = tl.max(l1, 0) + 1 - low1, tl.max(l2, 0) + 1 - low2
    keys = (tl.max(l0, 0) + 1 - low0) * w1 * w2

    rows = token(i0, i1, i2, r0, r1, r2, D0, D1, D2, L1, L2)
    q = load_rows(Q + (b * q_b + h * q_h), rows, q_n, inside, D, BLOCK_D, True)
    do = load_rows(DO + (b * do_b + h * do_h), rows, do_n, inside, DV, BLOCK_DV, True)
    statistics = (b * H + h) * N + rows
    lse = load_lse(LSE + statistics, inside)
    delta = tl.load(DELTA + statistics, mask=inside, other=0.0)
    K += b * k_b + h * k_h
    V += b * v_b + h * v_h
    if RPB is not None:
        RPB += b * rpb_b + h * rpb_h
    if DRPB is not None:
        DRPB += tl.program_id(0).to(tl.int64) * R
    dq = tl.zeros([BM, BLOCK_D], tl.float32)
    for start in range(0, keys, BN):
        c = start + tl.arange(0, BN)
        k0, k1, k2 = cells(c, w1, w2)
        k0, k1, k2 = low0 + k0, low1 + k1, low2 + k2
        columns = token(k0, k1, k2, r0, r1, r2, D0, D1, D2, L1, L2)
        visible = (c < keys)[None, :] & seen(
            k0[None, :], k1[None, :], k2[None, :],
            f0[:, None], l0[:, None], f1[:, None], l1[:, None], f2[:, None], l2[:, None], AXES,
        )  # fmt: skip
        index = relative(k0[None, :], k1[None, :], k2[None, :], i0[:, None], i1[:, None], i2[:, None], K0, K1, K2, AXES)
        k = load_rows(K, columns, k_n, c < keys, D, BLOCK_D, True)
        s = logits(product(q, tl.trans(k), UPCAST, PRECISION), scale2, RPB, index, visible)
        p = tl.exp2(s - lse[:, None])
        v = load_rows(V, columns, v_n, c < keys, DV, BLOCK_DV, True)
        ds = p * (product(do, tl.trans(v), UPCAST, PRECISION) - delta[:, None])
        if DRPB is not None:
            tl.atomic_add(DRPB + index, ds, mask=visible & inside[:, None], sem="relaxed")
        dq = accumulate(ds.to(k.dtype), k, dq, UPCAST, PRECISION)
    if DQ is not None:
        store_rows(DQ + (b * dq_b + h * dq_h), rows, dq_n, inside, dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=COUNTS)
def key_kernel(
    Q, K, V, RPB,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, rpb_b, rpb_h,
    H, N, L0, L1, L2, K0, K1, K2, D0, D1, D2, S0, S1, S2, TILES0, TILES1, TILES2, scale2,
    DO, LSE, DELTA, do_b, do_h, do_n, scale,
    DK, DVAL, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr,
    AXES: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, SHIFTED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dK, dV or both of a box of BN keys of one head; scores are held transposed, (BN, BM)."""
    tiles = TILES0 * TILES1 * TILES2
    bh = tl.program_id(0) // tiles
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    r0, r1, r2, n0, n1, n2, p0, p1, p2 = tile_of(
        tl.program_id(0) % tiles, TILES1, TILES2, D0, D1, D2, L0, L1, L2, T0, T1, T2
    )
    k0, k1, k2 = cells(tl.arange(0, BN), T1, T2)
    k0, k1, k2 = p0 + k0, p1 + k1, p2 + k2
    inside = (k0 < n0) & (k1 < n1) & (k2 < n2)
    columns = token(k0, k1, k2, r0, r1, r2, D0, D1, D2, L1, L2)
    low0, high0 = onlookers(p0, tl.minimum(p0 + T0, n0) - 1, n0, K0, S0, C0, SHIFTED)
    low1, high1 = onlookers(p1, tl.minimum(p1 + T1, n1) - 1, n1, K1, S1, C1, SHIFTED)
    low2, high2 = onlookers(p2, tl.minimum(p2 + T2, n2) - 1, n2, K2, S2, C2, SHIFTED)
    w1, w2 = tl.maximum(high1 + 1 - low1, 1), tl.maximum(high2 + 1 - low2, 1)
    queries = tl.maximum(high0 + 1 - low0, 0) * w1 * w2

    k = load_rows(K + (b * k_b + h * k_h), columns, k_n, inside, D, BLOCK_D, True)
    v = load_rows(V + (b * v_b + h * v_h), columns, v_n, inside, DV, BLOCK_DV, True)
    Q += b * q_b + h * q_h
    DO += b * do_b + h * do_h
    LSE += (b * H + h) * N
    DELTA += (b * H + h) * N
    if RPB is not None:
        RPB += b * rpb_b + h * rpb_h
    WANT_K: tl.constexpr = DK is not None
    WANT_V: tl.constexpr = DVAL is not None
    # A loop cannot carry None.
    dk = tl.zeros([BN, BLOCK_D] if WANT_K else [1, 1], tl.float32)
    dv = tl.zeros([BN, BLOCK_DV] if WANT_V else [1, 1], tl.float32)
    for start in range(0, queries, BM):
        c = start + tl.arange(0, BM)
        i0, i1, i2 = cells(c, w1, w2)
        i0, i1, i2 = low0 + i0, low1 + i1, low2 + i2
        f0, l0 = window(i0, n0, K0, S0, C0, SHIFTED)
        f1, l1 = window(i1, n1, K1, S1, C1, SHIFTED)
        f2, l2 = window(i2, n2, K2, S2, C2, SHIFTED)
        rows = token(i0, i1, i2, r0, r1, r2, D0, D1, D2, L1, L2)
        walked = (c < queries) & (i1 < n1) & (i2 < n2)
        visible = inside[:, None] & walked[None, :] & seen(
            k0[:, None], k1[:, None], k2[:, None],
            f0[None, :], l0[None, :], f1[None, :], l1[None, :], f2[None, :], l2[None, :], AXES,
        )  # fmt: skip
        index = relative(k0[:, None], k1[:, None], k2[:, None], i0[None, :], i1[None, :], i2[None, :], K0, K1, K2, AXES)
        q = load_rows(Q, rows, q_n, walked, D, BLOCK_D, True)
        lse = load_lse(LSE + rows, walked)
        s = logits(product(k, tl.trans(q), UPCAST, PRECISION), scale2, RPB, index, visible)
        p = tl.exp2(s - lse[None, :])
        do = load_rows(DO, rows, do_n, walked, DV, BLOCK_DV, True)
        if WANT_V:
            dv = accumulate(p.to(do.dtype), do, dv, UPCAST, PRECISION)
        if WANT_K:
            delta = tl.load(DELTA + rows, mask=walked, other=0.0)
            ds = p * (product(v, tl.trans(do), UPCAST, PRECISION) - delta[None, :])
            dk = accumulate(ds.to(q.dtype), q, dk, UPCAST, PRECISION)
    if WANT_K:
        store_rows(DK + (b * dk_b + h * dk_h), columns, dk_n, inside, dk * scale, D, BLOCK_D)
    if WANT_V:
        store_rows(DVAL + (b * dv_b + h * dv_h), columns, dv_n, inside, dv, DV, BLOCK_DV)
