# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# Kernels are Triton, not Python: constants stand where constexpr is declared, constant conditions decide what is bound.
"""Pieces that the kernels of several operators share: products, loads of rows, the base-2 online softmax."""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def product(a, b, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """a·b in float32; UPCAST: operands are cast first (the interpreter multiplies bfloat16 wrongly)."""
    if UPCAST:
        result = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        result = tl.dot(a, b, input_precision=PRECISION)
    return result


@triton.jit
def accumulate(a, b, total, UPCAST: tl.constexpr, PRECISION: tl.constexpr):
    """total + a·b in float32; UPCAST as in :func:`product`."""
    if UPCAST:
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total, input_precision="ieee")
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def load_rows(base, row, stride, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """(rows, BLOCK) tile; columns from WIDTH on, and with MASKED the rows not ``inside``, are 0."""
    column = tl.arange(0, BLOCK)
    pointers = base + (row[:, None] * stride + column[None, :])
    # One return: the compiler also visits what follows a return inside a constant condition.
    if MASKED and WIDTH == BLOCK:
        tile = tl.load(pointers, mask=inside[:, None], other=0.0)
    elif MASKED:
        tile = tl.load(pointers, mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)
    elif WIDTH == BLOCK:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(column < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def store_rows(base, row, stride, inside, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write a tile's rows ``inside``, its first WIDTH columns, at ``row`` times ``stride``."""
    column = tl.arange(0, BLOCK)
    pointers = base + (row[:, None] * stride + column[None, :])
    if WIDTH == BLOCK:
        tl.store(pointers, value, mask=inside[:, None])
    else:
        tl.store(pointers, value, mask=inside[:, None] & (column < WIDTH)[None, :])


@triton.jit
def softmax_step(s, m, total):
    """Take the base-2 logits ``s`` into the running maximum and sum: (p, decay of what came before, m, total)."""
    m_new = tl.maximum(m, tl.max(s, 1))
    # −inf − (−inf) would be NaN in rows that have seen no key yet.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - shift[:, None])
    decay = tl.exp2(m - shift)
    return p, decay, m_new, total * decay + tl.sum(p, 1)


@triton.jit
def finish(acc, m, total):
    """Normalised accumulator and natural log-sum-exp; a row without keys gives 0 and −inf."""
    dead = total == 0.0
    out = acc / tl.where(dead, 1.0, total)[:, None]
    lse = tl.where(dead, float("-inf"), (m + tl.log2(tl.where(dead, 1.0, total))) * LN2)
    return out, lse


@triton.jit
def load_lse(pointers, inside):
    """Base-2 log-sum-exp for ``p = exp2(s - lse)``: rows outside or without keys read +inf, so that p is 0."""
    lse = tl.load(pointers, mask=inside, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def delta_kernel(
    DO, OUT, LSE, DLSE, DELTA,
    do_b, do_h, do_n, o_b, o_h, o_n, dlse_b, dlse_h, dlse_n,
    H, N,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """δ_i = do_i·o_i − dlse_i, 0 in rows without keys: what the softmax's gradient subtracts from dP."""
    tiles = tl.cdiv(N, BM)
    pid = tl.program_id(0)
    i0 = (pid % tiles) * BM
    b = (pid // tiles // H).to(tl.int64)
    h = (pid // tiles % H).to(tl.int64)
    i = tl.arange(0, BM)
    inside = i0 + i < N
    first = tl.cast(i0, tl.int64)
    do = load_rows(DO + (b * do_b + h * do_h + first * do_n), i, do_n, inside, DV, BLOCK_DV, True)
    out = load_rows(OUT + (b * o_b + h * o_h + first * o_n), i, o_n, inside, DV, BLOCK_DV, True)
    delta = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)
    if DLSE is not None:
        delta -= tl.load(DLSE + (b * dlse_b + h * dlse_h + first * dlse_n) + i * dlse_n, mask=inside, other=0.0)
    at = (b * H + h) * N + i0 + i
    lse = tl.load(LSE + at, mask=inside, other=0.0)
    tl.store(DELTA + at, tl.where(lse == float("-inf"), 0.0, delta), mask=inside)


@triton.jit(do_not_specialize=["P", "N", "STEPS"])
def starts_kernel(SORTED, START, P, N, STEPS, BLOCK: tl.constexpr):
    """START (rows, N + 1): where each number begins in its row of SORTED (rows, P), by halving, STEPS times."""
    row = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, BLOCK)
    low = tl.zeros([BLOCK], tl.int32)
    high = low + P
    for _ in range(STEPS):
        middle = (low + high) // 2
        apart = low < high
        less = apart & (tl.load(SORTED + row * P + middle, mask=apart, other=0) < n)
        low = tl.where(less, middle + 1, low)
        high = tl.where(apart & (less == 0), middle, high)
    tl.store(START + row * (N + 1) + n, low, mask=n <= N)
