# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false, reportOperatorIssue=false
# Kernels are Triton, not Python: constants stand where constexpr is declared, constant conditions decide what is bound.
"""Kernels of window scores and of sums over windows: boxes of cells as in neighborhood attention.

A tile is a box of queries, beside the box of keys that they see; its dense product is what a tensor core makes, and the
pairs that windows hold are stored to their slots, or read from them. Three kernels are both operators and all gradients
but that of the bias::

    scores   q·k, dO·v → slots        sums   p·v, dS·k → queries        keys   pᵀ·dO, dSᵀ·q → keys
"""

import triton
import triton.language as tl

from attn_core.kernels.tiles import accumulate, load_rows, product, store_rows
from attn_core.ops.neighborhood_attention.triton_forward import (
    cells,
    onlookers,
    relative,
    seen,
    tile_of,
    token,
    window,
)


@triton.jit
def base(first, p, KERNEL, CAUSAL: tl.constexpr, SHIFTED: tl.constexpr):
    """Position of a window's slot 0: its first key, or half a window before the query, in the grid or not."""
    if CAUSAL or SHIFTED:
        start = first
    else:
        start = p - KERNEL // 2
    return start


@triton.jit
def slot(k0, k1, k2, s0, s1, s2, K1, K2, AXES: tl.constexpr):
    """Number of the slot in which keys stand in windows that start at s; the caller orients both."""
    number = k2 - s2
    if AXES > 1:
        number += (k1 - s1) * K2
    if AXES > 2:
        number += (k0 - s0) * (K1 * K2)
    return number


@triton.jit
def scores_kernel(
    Q, K, RPB, OUT,
    q_b, q_h, q_n, k_b, k_h, k_n, rpb_b, rpb_h, o_b, o_h, o_n,
    H, L0, L1, L2, K0, K1, K2, D0, D1, D2, TILES0, TILES1, TILES2,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr,
    AXES: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, SHIFTED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: the slots of a box of BM queries of one head. OUT (B, H, N, S) holds what stands in empty slots."""
    tiles = TILES0 * TILES1 * TILES2
    b = (tl.program_id(0) // tiles // H).to(tl.int64)
    h = (tl.program_id(0) // tiles % H).to(tl.int64)
    r0, r1, r2, n0, n1, n2, p0, p1, p2 = tile_of(
        tl.program_id(0) % tiles, TILES1, TILES2, D0, D1, D2, L0, L1, L2, T0, T1, T2
    )
    i0, i1, i2 = cells(tl.arange(0, BM), T1, T2)
    inside = (p0 + i0 < n0) & (p1 + i1 < n1) & (p2 + i2 < n2)
    i0, i1, i2 = tl.minimum(p0 + i0, n0 - 1), tl.minimum(p1 + i1, n1 - 1), tl.minimum(p2 + i2, n2 - 1)
    f0, l0 = window(i0, n0, K0, 1, C0, SHIFTED)
    f1, l1 = window(i1, n1, K1, 1, C1, SHIFTED)
    f2, l2 = window(i2, n2, K2, 1, C2, SHIFTED)
    low0, low1, low2 = tl.min(f0, 0), tl.min(f1, 0), tl.min(f2, 0)
    w1, w2 = tl.max(l1, 0) + 1 - low1, tl.max(l2, 0) + 1 - low2
    keys = (tl.max(l0, 0) + 1 - low0) * w1 * w2
    s0, s1, s2 = base(f0, i0, K0, C0, SHIFTED), base(f1, i1, K1, C1, SHIFTED), base(f2, i2, K2, C2, SHIFTED)

    rows = token(i0, i1, i2, r0, r1, r2, D0, D1, D2, L1, L2)
    q = load_rows(Q + (b * q_b + h * q_h), rows, q_n, inside, D, BLOCK_D, True)
    K += b * k_b + h * k_h
    OUT += b * o_b + h * o_h
    for start in range(0, keys, BN):
        c = start + tl.arange(0, BN)
        k0, k1, k2 = cells(c, w1, w2)
        k0, k1, k2 = low0 + k0, low1 + k1, low2 + k2
        columns = token(k0, k1, k2, r0, r1, r2, D0, D1, D2, L1, L2)
        visible = inside[:, None] & (c < keys)[None, :] & seen(
            k0[None, :], k1[None, :], k2[None, :],
            f0[:, None], l0[:, None], f1[:, None], l1[:, None], f2[:, None], l2[:, None], AXES,
        )  # fmt: skip
        k = load_rows(K, columns, k_n, c < keys, D, BLOCK_D, True)
        s = product(q, tl.trans(k), UPCAST, PRECISION)
        if RPB is not None:
            index = relative(
                k0[None, :], k1[None, :], k2[None, :], i0[:, None], i1[:, None], i2[:, None], K0, K1, K2, AXES
            )
            s += tl.load(RPB + (b * rpb_b + h * rpb_h) + index, mask=visible, other=0.0).to(tl.float32)
        at = slot(k0[None, :], k1[None, :], k2[None, :], s0[:, None], s1[:, None], s2[:, None], K1, K2, AXES)
        tl.store(OUT + (rows[:, None] * o_n + at), s, mask=visible)


@triton.jit
def sums_kernel(
    P, V, OUT,
    p_b, p_h, p_n, v_b, v_h, v_n, o_b, o_h, o_n,
    H, L0, L1, L2, K0, K1, K2, D0, D1, D2, TILES0, TILES1, TILES2,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr,
    AXES: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, SHIFTED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: Σ over slots of P (B, H, N, S) times the rows of V, for a box of BM queries of one head."""
    tiles = TILES0 * TILES1 * TILES2
    b = (tl.program_id(0) // tiles // H).to(tl.int64)
    h = (tl.program_id(0) // tiles % H).to(tl.int64)
    r0, r1, r2, n0, n1, n2, p0, p1, p2 = tile_of(
        tl.program_id(0) % tiles, TILES1, TILES2, D0, D1, D2, L0, L1, L2, T0, T1, T2
    )
    i0, i1, i2 = cells(tl.arange(0, BM), T1, T2)
    inside = (p0 + i0 < n0) & (p1 + i1 < n1) & (p2 + i2 < n2)
    i0, i1, i2 = tl.minimum(p0 + i0, n0 - 1), tl.minimum(p1 + i1, n1 - 1), tl.minimum(p2 + i2, n2 - 1)
    f0, l0 = window(i0, n0, K0, 1, C0, SHIFTED)
    f1, l1 = window(i1, n1, K1, 1, C1, SHIFTED)
    f2, l2 = window(i2, n2, K2, 1, C2, SHIFTED)
    low0, low1, low2 = tl.min(f0, 0), tl.min(f1, 0), tl.min(f2, 0)
    w1, w2 = tl.max(l1, 0) + 1 - low1, tl.max(l2, 0) + 1 - low2
    keys = (tl.max(l0, 0) + 1 - low0) * w1 * w2
    s0, s1, s2 = base(f0, i0, K0, C0, SHIFTED), base(f1, i1, K1, C1, SHIFTED), base(f2, i2, K2, C2, SHIFTED)

    rows = token(i0, i1, i2, r0, r1, r2, D0, D1, D2, L1, L2)
    P += b * p_b + h * p_h
    V += b * v_b + h * v_h
    total = tl.zeros([BM, BLOCK_D], tl.float32)
    for start in range(0, keys, BN):
        c = start + tl.arange(0, BN)
        k0, k1, k2 = cells(c, w1, w2)
        k0, k1, k2 = low0 + k0, low1 + k1, low2 + k2
        columns = token(k0, k1, k2, r0, r1, r2, D0, D1, D2, L1, L2)
        visible = inside[:, None] & (c < keys)[None, :] & seen(
            k0[None, :], k1[None, :], k2[None, :],
            f0[:, None], l0[:, None], f1[:, None], l1[:, None], f2[:, None], l2[:, None], AXES,
        )  # fmt: skip
        at = slot(k0[None, :], k1[None, :], k2[None, :], s0[:, None], s1[:, None], s2[:, None], K1, K2, AXES)
        p = tl.load(P + (rows[:, None] * p_n + at), mask=visible, other=0.0)
        v = load_rows(V, columns, v_n, c < keys, D, BLOCK_D, True)
        total = accumulate(p.to(v.dtype), v, total, UPCAST, PRECISION)
    store_rows(OUT + (b * o_b + h * o_h), rows, o_n, inside, total, D, BLOCK_D)


@triton.jit
def keys_kernel(
    P, Q, OUT,
    p_b, p_h, p_n, q_b, q_h, q_n, o_b, o_h, o_n,
    H, L0, L1, L2, K0, K1, K2, D0, D1, D2, TILES0, TILES1, TILES2,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr,
    AXES: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, SHIFTED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: Σ of P times the rows of Q over the queries whose windows hold them, for a box of BM keys.

    Queries are walked in steps of BN.
    """
    tiles = TILES0 * TILES1 * TILES2
    b = (tl.program_id(0) // tiles // H).to(tl.int64)
    h = (tl.program_id(0) // tiles % H).to(tl.int64)
    r0, r1, r2, n0, n1, n2, p0, p1, p2 = tile_of(
        tl.program_id(0) % tiles, TILES1, TILES2, D0, D1, D2, L0, L1, L2, T0, T1, T2
    )
    k0, k1, k2 = cells(tl.arange(0, BM), T1, T2)
    k0, k1, k2 = p0 + k0, p1 + k1, p2 + k2
    inside = (k0 < n0) & (k1 < n1) & (k2 < n2)
    columns = token(k0, k1, k2, r0, r1, r2, D0, D1, D2, L1, L2)
    low0, high0 = onlookers(p0, tl.minimum(p0 + T0, n0) - 1, n0, K0, 1, C0, SHIFTED)
    low1, high1 = onlookers(p1, tl.minimum(p1 + T1, n1) - 1, n1, K1, 1, C1, SHIFTED)
    low2, high2 = onlookers(p2, tl.minimum(p2 + T2, n2) - 1, n2, K2, 1, C2, SHIFTED)
    w1, w2 = tl.maximum(high1 + 1 - low1, 1), tl.maximum(high2 + 1 - low2, 1)
    queries = tl.maximum(high0 + 1 - low0, 0) * w1 * w2
    P += b * p_b + h * p_h
    Q += b * q_b + h * q_h
    total = tl.zeros([BM, BLOCK_D], tl.float32)
    for start in range(0, queries, BN):
        c = start + tl.arange(0, BN)
        i0, i1, i2 = cells(c, w1, w2)
        i0, i1, i2 = low0 + i0, low1 + i1, low2 + i2
        f0, l0 = window(i0, n0, K0, 1, C0, SHIFTED)
        f1, l1 = window(i1, n1, K1, 1, C1, SHIFTED)
        f2, l2 = window(i2, n2, K2, 1, C2, SHIFTED)
        s0, s1, s2 = base(f0, i0, K0, C0, SHIFTED), base(f1, i1, K1, C1, SHIFTED), base(f2, i2, K2, C2, SHIFTED)
        rows = token(i0, i1, i2, r0, r1, r2, D0, D1, D2, L1, L2)
        walked = (c < queries) & (i1 < n1) & (i2 < n2)
        visible = inside[:, None] & walked[None, :] & seen(
            k0[:, None], k1[:, None], k2[:, None],
            f0[None, :], l0[None, :], f1[None, :], l1[None, :], f2[None, :], l2[None, :], AXES,
        )  # fmt: skip
        at = slot(k0[:, None], k1[:, None], k2[:, None], s0[None, :], s1[None, :], s2[None, :], K1, K2, AXES)
        p = tl.load(P + (rows[None, :] * p_n + at), mask=visible, other=0.0)
        q = load_rows(Q, rows, q_n, walked, D, BLOCK_D, True)
        total = accumulate(p.to(q.dtype), q, total, UPCAST, PRECISION)
    store_rows(OUT + (b * o_b + h * o_h), columns, o_n, inside, total, D, BLOCK_D)


@triton.jit
def bias_kernel(
    P, OUT,
    p_b, p_h, p_n,
    H, L0, L1, L2, K0, K1, K2, D0, D1, D2,
    BM: tl.constexpr, BN: tl.constexpr,
    AXES: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    """One program: Σ of P over the cells of one image and head, for BM offsets of key from query. OUT (B, H, R).

    Every offset looks at every cell, so that no two additions meet in one entry and the order is always the same.
    """
    R1, R2 = 2 * K1 - 1, 2 * K2 - 1
    size = (2 * K0 - 1) * R1 * R2
    blocks = tl.cdiv(size, BM)
    offset = tl.program_id(0) % blocks * BM + tl.arange(0, BM)
    o0, o1, o2 = cells(offset, R1, R2)
    o0, o1, o2 = (o0 - K0 + 1)[:, None], (o1 - K1 + 1)[:, None], (o2 - K2 + 1)[:, None]
    bh = tl.program_id(0) // blocks
    P += (bh // H).to(tl.int64) * p_b + (bh % H).to(tl.int64) * p_h
    total = tl.zeros([BM], tl.float32)
    for start in range(0, L0 * L1 * L2, BN):
        cell = start + tl.arange(0, BN)
        x0, x1, x2 = cells(cell, L1, L2)
        i0, i1, i2 = x0 // D0, x1 // D1, x2 // D2
        n0, n1, n2 = tl.cdiv(L0 - x0 % D0, D0), tl.cdiv(L1 - x1 % D1, D1), tl.cdiv(L2 - x2 % D2, D2)
        f0, l0 = window(i0, n0, K0, 1, C0, SHIFTED)
        f1, l1 = window(i1, n1, K1, 1, C1, SHIFTED)
        f2, l2 = window(i2, n2, K2, 1, C2, SHIFTED)
        k0, k1, k2 = i0[None, :] + o0, i1[None, :] + o1, i2[None, :] + o2
        visible = (
            (offset < size)[:, None]
            & (cell < L0 * L1 * L2)[None, :]
            & seen(k0, k1, k2, f0[None, :], l0[None, :], f1[None, :], l1[None, :], f2[None, :], l2[None, :], AXES)
        )
        s0, s1, s2 = base(f0, i0, K0, C0, SHIFTED), base(f1, i1, K1, C1, SHIFTED), base(f2, i2, K2, C2, SHIFTED)
        at = slot(k0, k1, k2, s0[None, :], s1[None, :], s2[None, :], K1, K2, AXES)
        p = tl.load(P + (cell.to(tl.int64)[None, :] * p_n + at), mask=visible, other=0.0)
        total += tl.sum(p.to(tl.float32), 1)
    tl.store(OUT + (bh.to(tl.int64) * size + offset), total, mask=offset < size)
