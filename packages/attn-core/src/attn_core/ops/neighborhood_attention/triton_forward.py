# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false, reportOperatorIssue=false
# Kernels are Triton, not Python: constants stand where constexpr is declared, constant conditions decide what is bound.
"""Forward kernel of neighborhood attention, and what the backward kernels share: windows, boxes, logits.

There are always three axes; grids of fewer have axes of length 1 in front, which AXES leaves out of the arithmetic. A
tile is a box of BM = T0·T1·T2 queries of one residue. The keys that it sees lie in a box too: its cells, row-major, are
walked in steps of BN, so no step is wasted on the shape of the box, and each pair is tested against the windows.
"""

import triton
import triton.language as tl

from attn_core.kernels.tiles import (
    LOG2E,
    accumulate,
    finish,
    load_rows,
    product,
    softmax_step,
    store_rows,
)

# What changes from image to image: no value of it is worth a compiled kernel of its own. Sides and tiles of the first
# axis are not among them: they are 1 in images, where divisions by them vanish.
COUNTS = ["R", "L1", "L2", "TILES1", "TILES2"]


@triton.jit
def window(p, n, KERNEL, STRIDE, CAUSAL: tl.constexpr, SHIFTED: tl.constexpr):
    """First and last position that position ``p`` of ``n`` sees."""
    if CAUSAL:
        leader = tl.minimum(p // STRIDE * STRIDE + STRIDE - 1, n - 1)
        first = tl.maximum(leader - KERNEL + 1, 0)
        last = p
    else:
        leader = tl.minimum(p // STRIDE * STRIDE + STRIDE // 2, n - 1)
        first = leader - KERNEL // 2
        if SHIFTED:
            first = tl.minimum(tl.maximum(first, 0), n - KERNEL)
        last = tl.minimum(first + KERNEL, n) - 1
        first = tl.maximum(first, 0)
    return first, last


@triton.jit
def onlookers(first, last, n, KERNEL, STRIDE, CAUSAL: tl.constexpr, SHIFTED: tl.constexpr):
    """First and last query that may see a position between ``first`` and ``last``: the tests of windows decide."""
    if CAUSAL:
        low = first
        high = last + KERNEL - 1
    else:
        low = first - KERNEL // 2 - STRIDE
        high = last + KERNEL // 2 + STRIDE
        if SHIFTED:
            low = tl.where(first < KERNEL, 0, low)
            high = tl.where(last >= n - KERNEL, n - 1, high)
    return tl.maximum(low, 0), tl.minimum(high, n - 1)


@triton.jit
def tile_of(pid, TILES1, TILES2, D0, D1, D2, L0, L1, L2, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr):
    """Residues, numbers of positions and first positions of a tile along the three axes."""
    t2 = pid % TILES2
    t1 = pid // TILES2 % TILES1
    t0 = pid // (TILES2 * TILES1)
    r0, r1, r2 = t0 % D0, t1 % D1, t2 % D2
    n0, n1, n2 = tl.cdiv(L0 - r0, D0), tl.cdiv(L1 - r1, D1), tl.cdiv(L2 - r2, D2)
    return r0, r1, r2, n0, n1, n2, t0 // D0 * T0, t1 // D1 * T1, t2 // D2 * T2


@triton.jit
def cells(c, w1, w2):
    """Coordinates of the cells ``c`` of a box, row-major."""
    return c // (w2 * w1), c // w2 % w1, c % w2


@triton.jit
def token(p0, p1, p2, r0, r1, r2, D0, D1, D2, L1, L2):
    """Place in memory of the cell p of residue r, for dilations D on a grid L."""
    return ((r0 + p0 * D0) * L1 + r1 + p1 * D1).to(tl.int64) * L2 + r2 + p2 * D2


@triton.jit
def seen(k0, k1, k2, f0, l0, f1, l1, f2, l2, AXES: tl.constexpr):
    """Whether keys lie in windows; the caller orients both."""
    visible = (f2 <= k2) & (k2 <= l2)
    if AXES > 1:
        visible = visible & (f1 <= k1) & (k1 <= l1)
    if AXES > 2:
        visible = visible & (f0 <= k0) & (k0 <= l0)
    return visible


@triton.jit
def relative(k0, k1, k2, q0, q1, q2, K0, K1, K2, AXES: tl.constexpr):
    """Index into the flat bias table."""
    index = k2 - q2 + (K2 - 1)
    if AXES > 1:
        index += (k1 - q1 + (K1 - 1)) * (2 * K2 - 1)
    if AXES > 2:
        index += (k0 - q0 + (K0 - 1)) * ((2 * K1 - 1) * (2 * K2 - 1))
    return index


@triton.jit
def logits(s, scale2, RPB, index, visible):
    """Base-2 logits of a tile of dot products."""
    s = s * scale2
    if RPB is not None:
        s += tl.load(RPB + index, mask=visible, other=0.0).to(tl.float32) * LOG2E
    return tl.where(visible, s, float("-inf"))


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    Q, K, V, RPB,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, rpb_b, rpb_h,
    H, N, L0, L1, L2, K0, K1, K2, D0, D1, D2, S0, S1, S2, TILES0, TILES1, TILES2, scale2,
    OUT, LSE, o_b, o_h, o_n,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, T0: tl.constexpr, T1: tl.constexpr, T2: tl.constexpr,
    AXES: tl.constexpr, C0: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, SHIFTED: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a box of BM queries of one head and all the keys they see."""
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
    K += b * k_b + h * k_h
    V += b * v_b + h * v_h
    if RPB is not None:
        RPB += b * rpb_b + h * rpb_h
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_DV], tl.float32)
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
        p, decay, m, total = softmax_step(s, m, total)
        v = load_rows(V, columns, v_n, c < keys, DV, BLOCK_DV, True)
        acc = accumulate(p.to(v.dtype), v, acc * decay[:, None], UPCAST, PRECISION)
    out, lse = finish(acc, m, total)
    store_rows(OUT + (b * o_b + h * o_h), rows, o_n, inside, out, DV, BLOCK_DV)
    tl.store(LSE + ((b * H + h) * N + rows), lse, mask=inside)
