# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false, reportCallIssue=false
# Kernels are Triton, not Python: constants stand where constexpr is declared, constant conditions decide what is bound.
"""Kernels of channel attention: one reduces two operands over the tokens to C×C, one multiplies tokens by C×C.

Each serves both passes: forward is gram (softmax) and mix, backward is gram (softmax gradient) and three times mix.
Tokens and channels have strides of their own, so that (B, N, H, C) projections and (B, C, Y, X) maps are read in place.
"""

import triton
import triton.language as tl

from attn_core.kernels.tiles import accumulate, store_rows


@triton.jit
def load_block(base, n, c, inside_n, x_n, x_c, C: tl.constexpr):
    """(tokens, channels) tile; what is outside is 0."""
    return tl.load(base + (n[:, None] * x_n + c[None, :] * x_c), mask=inside_n[:, None] & (c < C)[None, :], other=0.0)


@triton.jit
def gram_kernel(
    L, R, A, OUT, l_b, l_h, l_n, l_c, r_b, r_h, r_n, r_c, H, N, scale2,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM rows of G = Σ_n l_nᵀ r_n. OUT is softmax(scale·G), or with A given A∘(G − Σ_d G∘A)."""
    tiles = tl.cdiv(C, BM)
    bh = tl.program_id(0) // tiles
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    row = tl.arange(0, BM) + tl.program_id(0) % tiles * BM
    column = tl.arange(0, BLOCK_C)
    n = tl.arange(0, BN)
    L += b * l_b + h * l_h
    R += b * r_b + h * r_h
    g = tl.zeros([BM, BLOCK_C], tl.float32)
    for n0 in range(0, N, BN):
        first = tl.cast(n0, tl.int64)
        inside_n = n0 + n < N
        left = load_block(L + first * l_n, n, row, inside_n, l_n, l_c, C)
        right = load_block(R + first * r_n, n, column, inside_n, r_n, r_c, C)
        g = accumulate(tl.trans(left), right, g, UPCAST, PRECISION)
    at = bh.to(tl.int64) * C * C + (row[:, None] * C + column[None, :])
    inside = (row[:, None] < C) & (column[None, :] < C)
    if A is not None:
        a = tl.load(A + at, mask=inside, other=0.0)
        out = a * (g - tl.sum(g * a, 1)[:, None])
    else:
        s = tl.where((column < C)[None, :], g * scale2, float("-inf"))
        p = tl.exp2(s - tl.max(s, 1)[:, None])
        out = p / tl.sum(p, 1)[:, None]
    tl.store(OUT + at, out, mask=inside)


@triton.jit
def mix_kernel(
    X, MIX, OUT, x_b, x_h, x_n, x_c, o_b, o_h, o_n, H, N, scale,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, TRANSPOSE: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM tokens of y = scale·x M, or scale·x Mᵀ; BN channels of x at a time."""
    tiles = tl.cdiv(N, BM)
    bh = tl.program_id(0) // tiles
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    n0 = tl.program_id(0) % tiles * BM
    first = tl.cast(n0, tl.int64)
    n = tl.arange(0, BM)
    inside_n = n0 + n < N
    column = tl.arange(0, BLOCK_C)
    X += b * x_b + h * x_h + first * x_n
    MIX += bh.to(tl.int64) * C * C
    y = tl.zeros([BM, BLOCK_C], tl.float32)
    for c0 in range(0, C, BN):
        c = c0 + tl.arange(0, BN)
        x = load_block(X, n, c, inside_n, x_n, x_c, C)
        inside = (c < C)[:, None] & (column < C)[None, :]
        if TRANSPOSE:
            mix = tl.load(MIX + (column[None, :] * C + c[:, None]), mask=inside, other=0.0)
        else:
            mix = tl.load(MIX + (c[:, None] * C + column[None, :]), mask=inside, other=0.0)
        y = accumulate(x, mix.to(x.dtype), y, UPCAST, PRECISION)
    store_rows(OUT + (b * o_b + h * o_h + first * o_n), n, o_n, inside_n, y * scale, C, BLOCK_C)
