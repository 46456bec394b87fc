# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false, reportOperatorIssue=false
# Kernels are Triton, not Python: constants stand where constexpr is declared, constant conditions decide what is bound.
"""Kernels of focal modulation: one level forward, one level backward.

Maps are (B, Y, X, C). A program of a level owns BM cells of one row and BN channels, and walks the K×K taps.
"""

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
INVERSE_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def place(Y, X, C, BM: tl.constexpr, BN: tl.constexpr):
    """(image, row, cells, channels, which of them are inside) of this program."""
    pid = tl.program_id(0)
    channel_tiles = tl.cdiv(C, BN)
    cell_tiles = tl.cdiv(X, BM)
    c = pid % channel_tiles * BN + tl.arange(0, BN)
    rest = pid // channel_tiles
    x = rest % cell_tiles * BM + tl.arange(0, BM)
    rest = rest // cell_tiles
    return (rest // Y).to(tl.int64), rest % Y, x, c, (x[:, None] < X) & (c[None, :] < C)


@triton.jit
def convolve(
    Z, KERNELS, y, x, c, z_y, z_x, z_c, Y, X, C,
    K: tl.constexpr, FLIP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Depthwise K×K convolution of image Z, zero-padded; with FLIP its transpose. KERNELS is (C, K, K)."""
    total = tl.zeros([BM, BN], tl.float32)
    for tap in range(K * K):
        row = y + tap // K - K // 2
        cell = x + tap % K - K // 2
        at = KERNELS + c * (K * K)
        if FLIP:
            at += K * K - 1 - tap
        else:
            at += tap
        weight = tl.load(at, mask=c < C, other=0.0).to(tl.float32)
        # The row's test in a vector: the interpreter takes no scalar of a comparison for a mask.
        cells = (cell >= 0) & (cell < X) & (row + tl.zeros_like(cell) >= 0) & (row + tl.zeros_like(cell) < Y)
        inside = cells[:, None] & (c < C)[None, :]
        pointers = Z + tl.cast(row, tl.int64) * z_y + (cell[:, None] * z_x + c[None, :] * z_c)
        total += tl.load(pointers, mask=inside, other=0.0).to(tl.float32) * weight[None, :]
    return total


@triton.jit(do_not_specialize=["Y", "X"])
def level_kernel(
    Z, KERNELS, GATES, U, OUT, SUM,
    z_b, z_y, z_x, z_c, k_b, g_b, g_y, g_x, Y, X, C,
    K: tl.constexpr, FIRST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """u = W ∗ z, OUT = gelu(u); SUM (+)= OUT·gate. U, OUT and SUM are contiguous; U or SUM may be absent."""
    b, y, x, c, inside = place(Y, X, C, BM, BN)
    u = convolve(Z + b * z_b, KERNELS + b * k_b, y, x, c, z_y, z_x, z_c, Y, X, C, K, False, BM, BN)
    out = 0.5 * u * (1.0 + tl.erf(u * SQRT_HALF))
    at = (b * Y + y) * X * C + (x[:, None] * C + c[None, :])
    tl.store(OUT + at, out, mask=inside)
    if U is not None:
        tl.store(U + at, u, mask=inside)
    if SUM is not None:
        gate = tl.load(GATES + b * g_b + tl.cast(y, tl.int64) * g_y + x * g_x, mask=x < X, other=0.0)
        total = out * gate.to(tl.float32)[:, None]
        if not FIRST:
            total += tl.load(SUM + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(SUM + at, total, mask=inside)


@triton.jit(do_not_specialize=["Y", "X"])
def level_gradient_kernel(
    DU, KERNELS, D_MEAN, DY, GATES, U, OUT,
    k_b, dy_b, dy_y, dy_x, dy_c, g_b, g_y, g_x, Y, X, C, scale,
    K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dz = Wᵀ ∗ DU of the next level, or D_MEAN (B, C) at the last; OUT = (dz + scale·dy·gate) gelu'(u).

    Without U, OUT = dz: the gradient of ctx. DU, U and OUT are contiguous.
    """
    b, y, x, c, inside = place(Y, X, C, BM, BN)
    if DU is not None:
        dz = convolve(DU + b * Y * X * C, KERNELS + b * k_b, y, x, c, X * C, C, 1, Y, X, C, K, True, BM, BN)
    else:
        dz = tl.zeros([BM, BN], tl.float32) + tl.load(D_MEAN + b * C + c, mask=c < C, other=0.0)[None, :]
    at = (b * Y + y) * X * C + (x[:, None] * C + c[None, :])
    if U is not None:
        row = tl.cast(y, tl.int64)
        gate = tl.load(GATES + b * g_b + row * g_y + x * g_x, mask=x < X, other=0.0).to(tl.float32)
        dy = tl.load(DY + b * dy_b + row * dy_y + (x[:, None] * dy_x + c[None, :] * dy_c), mask=inside, other=0.0)
        u = tl.load(U + at, mask=inside, other=0.0).to(tl.float32)
        slope = 0.5 * (1.0 + tl.erf(u * SQRT_HALF)) + u * tl.exp(-0.5 * u * u) * INVERSE_SQRT_2PI
        dz = (dz + dy.to(tl.float32) * (gate * scale)[:, None]) * slope
    tl.store(OUT + at, dz, mask=inside)
