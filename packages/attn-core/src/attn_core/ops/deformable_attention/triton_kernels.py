# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# pyright: reportOperatorIssue=false, reportGeneralTypeIssues=false
# Kernels are Triton, not Python: constants stand where constexpr is declared, constant conditions decide what is bound.
"""Kernels of deformable attention: one program takes BM (query, head) pairs, one sample at a time.

A sample reads four cells. The rows of the pairs of a program are BLOCK_D wide tiles, gathered once for each corner; no
sample is stored. Dots over the width are sums of a tile: there is no product of matrices in this operator.
"""

import triton
import triton.language as tl


@triton.jit
def linear(position, size, side: tl.constexpr):
    """Index, weight and derivative of the cell before (0) or after (1) a position; outside cells weigh 0."""
    near = (position > -1.0) & (position < size)
    position = tl.where(near, position, 0.0)
    before = tl.floor(position)
    fraction = position - before
    index = before.to(tl.int32) + side
    inside = near & (index >= 0) & (index < size)
    if side == 0:
        weight = 1.0 - fraction
        slope = -1.0
    else:
        weight = fraction
        slope = 1.0
    return tl.where(inside, index, 0), tl.where(inside, weight, 0.0), tl.where(inside, slope, 0.0), inside


@triton.jit
def depth_of(DEPTH, cell, d, inside, BINS):
    """Depth of cells read at d, its derivative by the position, and the two bins with their weights."""
    z0, near, near_slope, in0 = linear(d, BINS, 0)
    z1, far, far_slope, in1 = linear(d, BINS, 1)
    first = tl.load(DEPTH + cell + z0, mask=inside & in0, other=0.0).to(tl.float32)
    second = tl.load(DEPTH + cell + z1, mask=inside & in1, other=0.0).to(tl.float32)
    read = near * first + far * second
    return read, near_slope * first + far_slope * second, z0, near, z1, far


@triton.jit(do_not_specialize=["BINS", "pairs"])
def forward_kernel(
    VALUE, SHAPES, LOCATIONS, WEIGHTS, DEPTH,
    v_b, v_s, v_h, x_b, a_b, z_b, z_s, z_h, N, H, BINS, pairs,
    OUT,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, L: tl.constexpr, P: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """One program: BM pairs (query, head), all samples."""
    pair = tl.program_id(0) * BM + tl.arange(0, BM)
    active = pair < pairs
    b = (pair // (N * H)).to(tl.int64)
    local = pair % (N * H)
    h = (local % H).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    wide = (column < D)[None, :]
    VALUE += b[:, None] * v_b + h[:, None] * v_h + column[None, :]
    X_ROW = LOCATIONS + b * x_b + local.to(tl.int64) * (L * P * X)
    A_ROW = WEIGHTS + b * a_b + local.to(tl.int64) * (L * P)
    acc = tl.zeros([BM, BLOCK_D], tl.float32)
    start = 0
    for level in range(L):
        height = tl.load(SHAPES + 2 * level)
        width = tl.load(SHAPES + 2 * level + 1)
        for point in range(P):
            sample = level * P + point
            a = tl.load(A_ROW + sample, mask=active, other=0.0).to(tl.float32)
            x = tl.load(X_ROW + sample * X, mask=active, other=-9.0) * width - 0.5
            y = tl.load(X_ROW + sample * X + 1, mask=active, other=-9.0) * height - 0.5
            if DEPTH is not None:
                d = tl.load(X_ROW + sample * X + 2, mask=active, other=-9.0) * BINS - 0.5
            for corner in tl.static_range(4):
                row, wy, _, in_y = linear(y, height, corner // 2)
                col, wx, _, in_x = linear(x, width, corner % 2)
                inside = active & in_y & in_x
                cell = (start + row * width + col).to(tl.int64)
                share = a * wy * wx
                if DEPTH is not None:
                    read, _, _, _, _, _ = depth_of(DEPTH + b * z_b + h * z_h, cell * z_s, d, inside, BINS)
                    share *= read
                v = tl.load(VALUE + cell[:, None] * v_s, mask=inside[:, None] & wide, other=0.0)
                acc += share[:, None] * v.to(tl.float32)
        start += height * width
    out = OUT + pair.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(out, acc, mask=active[:, None] & wide)


@triton.jit(do_not_specialize=["BINS", "pairs", "cells"])
def backward_kernel(
    VALUE, SHAPES, LOCATIONS, WEIGHTS, DEPTH,
    v_b, v_s, v_h, x_b, a_b, z_b, z_s, z_h, N, H, BINS, pairs,
    DO, do_b, do_n, DVALUE, DLOCATIONS, DWEIGHTS, DDEPTH, cells,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BM: tl.constexpr, L: tl.constexpr, P: tl.constexpr, X: tl.constexpr,
):  # fmt: skip
    """One program: BM pairs; DVALUE and DDEPTH (float32, contiguous, zeros at the start) are added to by all."""
    pair = tl.program_id(0) * BM + tl.arange(0, BM)
    active = pair < pairs
    b = (pair // (N * H)).to(tl.int64)
    local = pair % (N * H)
    h = (local % H).to(tl.int64)
    column = tl.arange(0, BLOCK_D)
    wide = (column < D)[None, :]
    VALUE += b[:, None] * v_b + h[:, None] * v_h + column[None, :]
    X_ROW = LOCATIONS + b * x_b + local.to(tl.int64) * (L * P * X)
    A_ROW = WEIGHTS + b * a_b + local.to(tl.int64) * (L * P)
    n = (local // H).to(tl.int64)
    do = tl.load(
        DO + (b * do_b + n * do_n + h * D)[:, None] + column[None, :], mask=active[:, None] & wide, other=0.0
    ).to(tl.float32)
    start = 0
    for level in range(L):
        height = tl.load(SHAPES + 2 * level)
        width = tl.load(SHAPES + 2 * level + 1)
        for point in range(P):
            sample = level * P + point
            own = pair.to(tl.int64) * (L * P) + sample
            a = tl.load(A_ROW + sample, mask=active, other=0.0).to(tl.float32)
            x = tl.load(X_ROW + sample * X, mask=active, other=-9.0) * width - 0.5
            y = tl.load(X_ROW + sample * X + 1, mask=active, other=-9.0) * height - 0.5
            if DEPTH is not None:
                d = tl.load(X_ROW + sample * X + 2, mask=active, other=-9.0) * BINS - 0.5
            da = tl.zeros([BM], tl.float32)
            dx = tl.zeros([BM], tl.float32)
            dy = tl.zeros([BM], tl.float32)
            dd = tl.zeros([BM], tl.float32)
            for corner in tl.static_range(4):
                row, wy, slope_y, in_y = linear(y, height, corner // 2)
                col, wx, slope_x, in_x = linear(x, width, corner % 2)
                inside = active & in_y & in_x
                cell = (start + row * width + col).to(tl.int64)
                v = tl.load(VALUE + cell[:, None] * v_s, mask=inside[:, None] & wide, other=0.0)
                dot = tl.sum(do * v.to(tl.float32), 1)
                share = a * wy * wx
                if DEPTH is not None:
                    read, slope, z0, near, z1, far = depth_of(DEPTH + b * z_b + h * z_h, cell * z_s, d, inside, BINS)
                    dd += wy * wx * slope * dot
                    if DDEPTH is not None:
                        bins = DDEPTH + ((b * cells + cell) * H + h) * BINS
                        tl.atomic_add(bins + z0, share * near * dot, mask=inside & (near != 0.0), sem="relaxed")
                        tl.atomic_add(bins + z1, share * far * dot, mask=inside & (far != 0.0), sem="relaxed")
                    share *= read
                    dot *= read
                da += wy * wx * dot
                dx += slope_x * wy * dot
                dy += slope_y * wx * dot
                if DVALUE is not None:
                    target = DVALUE + (((b * cells + cell) * H + h) * D)[:, None] + column[None, :]
                    tl.atomic_add(target, share[:, None] * do, mask=inside[:, None] & wide, sem="relaxed")
            tl.store(DWEIGHTS + own, da, mask=active)
            tl.store(DLOCATIONS + own * X, a * dx * width, mask=active)
            tl.store(DLOCATIONS + own * X + 1, a * dy * height, mask=active)
            if DEPTH is not None:
                tl.store(DLOCATIONS + own * X + 2, a * dd * BINS, mask=active)
        start += height * width
