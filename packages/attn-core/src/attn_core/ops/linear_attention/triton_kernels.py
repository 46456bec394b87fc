# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# Kernels are Triton, not Python: constants stand where constexpr is declared, constant conditions decide what is bound.
"""Two kernels for output and gradients of linear attention: states that arrive at each chunk, and rows of a chunk.

Roles as in :mod:`.torch_backend`: out = (abᵀ∘W)c. The state of b and c is walked forwards or backwards; a chunk's rows
then need only what is in the chunk and the states that arrive at it. λ appears with exponents ≥ 0 alone.
"""

import triton
import triton.language as tl

from attn_core.kernels.tiles import LOG2E


@triton.jit
def load_tile(base, row, row_stride, inside, column, width):
    """Rows ``inside`` and the first ``width`` columns of a matrix; zeros elsewhere."""
    mask = inside[:, None] & (column < width)[None, :]
    return tl.load(base + (row[:, None] * row_stride + column[None, :]), mask=mask, other=0.0)


@triton.jit
def wide_product(x, y, total, NARROW: tl.constexpr, PRECISION: tl.constexpr):
    """total + x·y of sums, which may not fit float16: bfloat16 where data is, else float32 or tf32."""
    if NARROW:
        total = tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16), total)
    else:
        total = tl.dot(x.to(tl.float32), y.to(tl.float32), total, input_precision=PRECISION)
    return total


@triton.jit
def head_decay(LOG, b, h, log_b):
    """Base-2 logarithm of λ."""
    if LOG is None:
        decay = 0.0
    else:
        decay = tl.load(LOG + b * log_b + h) * LOG2E
    return decay


@triton.jit(do_not_specialize=["CHUNKS"])
def state_kernel(
    B, C, LOG, START, STATES, FINAL,
    b_b, b_h, b_n, c_b, c_h, c_n, log_b, start_b, start_h, start_d, start_c,
    H, N, T, CHUNKS, scale,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    REVERSE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a BK×BN tile of one head's state Σ λ^… b (scale·c)ᵀ, stored as it arrives at each chunk.

    N tokens of T, the longer of the two sequences: the walk goes over T, FINAL is the state behind the last of the N.
    """
    across = tl.cdiv(DV, BN)
    tiles = across * tl.cdiv(D, BK)
    pid = tl.program_id(0)
    bh = pid // tiles
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    d = (pid % tiles) // across * BK + tl.arange(0, BK)
    e = (pid % tiles) % across * BN + tl.arange(0, BN)
    inside = (d < D)[:, None] & (e < DV)[None, :]
    B += b * b_b + h * b_h
    C += b * c_b + h * c_h
    STATES += (b * H + h) * CHUNKS * D * DV
    at = d[:, None] * DV + e[None, :]
    decay = head_decay(LOG, b, h, log_b)
    state = tl.zeros([BK, BN], tl.float32)
    if START is not None:
        START += b * start_b + h * start_h
        state += tl.load(START + (d[:, None] * start_d + e[None, :] * start_c), mask=inside, other=0.0)
    s = tl.arange(0, BM)
    for step in range(CHUNKS):
        chunk = step
        if REVERSE:
            chunk = CHUNKS - 1 - step
        first = tl.cast(chunk, tl.int64) * BM
        length = tl.minimum(T - chunk * BM, BM)
        own = tl.maximum(tl.minimum(N - chunk * BM, BM), 0)
        tl.store(STATES + tl.cast(chunk, tl.int64) * (D * DV) + at, state, mask=inside)
        here = s < own
        tile_b = load_tile(B + first * b_n, s, b_n, here, d, D)
        tile_c = load_tile(C + first * c_n, s, c_n, here, e, DV)
        if REVERSE:
            power = s + 1
        else:
            power = tl.maximum(own - 1 - s, 0)
        weighted = (tile_b.to(tl.float32) * tl.exp2(decay * power.to(tl.float32))[:, None]).to(tile_b.dtype)
        if UPCAST:
            sums = tl.dot(tl.trans(weighted).to(tl.float32), tile_c.to(tl.float32), input_precision="ieee")
        else:
            sums = tl.dot(tl.trans(weighted), tile_c, input_precision=PRECISION)
        if REVERSE:
            state = state * tl.exp2(decay * length.to(tl.float32)) + sums * scale
        else:
            state = state * tl.exp2(decay * own.to(tl.float32)) + sums * scale
            if (own > 0) & (chunk * BM + BM >= N):
                tl.store(FINAL + (b * H + h) * D * DV + at, state, mask=inside)
            state = state * tl.exp2(decay * (length - own).to(tl.float32))
    if REVERSE:
        tl.store(FINAL + (b * H + h) * D * DV + at, state, mask=inside)


@triton.jit(do_not_specialize=["ROWS", "CHUNKS"])
def output_kernel(
    A, B, C, LOG, FORWARD, BACKWARD, OUT,
    a_b, a_h, a_n, b_b, b_h, b_n, c_b, c_h, c_n, log_b, state_d, state_c, o_b, o_h, o_n,
    H, N, M, T, ROWS, CHUNKS, scale_inside, scale_state,
    D: tl.constexpr, DV: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
    NARROW: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr, WIDE_PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BN columns of a chunk's rows, from the chunk itself and the states that arrive at it.

    N tokens of A and OUT in ROWS chunks, M of B and C, T the longer, in CHUNKS chunks.

    FORWARD and BACKWARD hold the states of the two walks; with one of them W is lower or upper triangular, with both
    it is full.
    """
    across = tl.cdiv(DV, BN)
    pid = tl.program_id(0)
    chunk = pid // across % ROWS
    bh = pid // across // ROWS
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    e = pid % across * BN + tl.arange(0, BN)
    first = tl.cast(chunk, tl.int64) * BM
    r = tl.arange(0, BM)
    length = tl.minimum(T - chunk * BM, BM)
    here = r < N - chunk * BM
    there = r < M - chunk * BM
    A += b * a_b + h * a_h + first * a_n
    B += b * b_b + h * b_h + first * b_n
    C += b * c_b + h * c_h + first * c_n
    states = ((b * H + h) * CHUNKS + chunk) * D * DV
    decay = head_decay(LOG, b, h, log_b)
    arriving = tl.exp2(decay * (r + 1).to(tl.float32)) * scale_state
    leaving = tl.exp2(decay * tl.maximum(length - 1 - r, 0).to(tl.float32)) * scale_state

    scores = tl.zeros([BM, BM], tl.float32)
    before = tl.zeros([BM, BN], tl.float32)
    behind = tl.zeros([BM, BN], tl.float32)
    for d0 in range(0, D, BK):
        d = d0 + tl.arange(0, BK)
        inside = (d < D)[:, None] & (e < DV)[None, :]
        at = states + d[:, None] * state_d + e[None, :] * state_c
        a = load_tile(A, r, a_n, here, d, D)
        tile_b = load_tile(B, r, b_n, there, d, D)
        if UPCAST:
            scores = tl.dot(a.to(tl.float32), tl.trans(tile_b).to(tl.float32), scores, input_precision="ieee")
        else:
            scores = tl.dot(a, tl.trans(tile_b), scores, input_precision=PRECISION)
        if FORWARD is not None:
            state = tl.load(FORWARD + at, mask=inside, other=0.0)
            before = wide_product(a, state, before, NARROW, WIDE_PRECISION)
        if BACKWARD is not None:
            state = tl.load(BACKWARD + at, mask=inside, other=0.0)
            behind = wide_product(a, state, behind, NARROW, WIDE_PRECISION)
    distance = r[:, None] - r[None, :]
    scores *= tl.exp2(decay * tl.abs(distance).to(tl.float32)) * scale_inside
    if BACKWARD is None:
        scores = tl.where(distance >= 0, scores, 0.0)
    if FORWARD is None:
        scores = tl.where(distance <= 0, scores, 0.0)
    out = tl.zeros([BM, BN], tl.float32)
    if FORWARD is not None:
        out += before * arriving[:, None]
    if BACKWARD is not None:
        out += behind * leaving[:, None]
    c = load_tile(C, r, c_n, there, e, DV)
    out = wide_product(scores, c, out, NARROW, WIDE_PRECISION)
    OUT += b * o_b + h * o_h + first * o_n
    tl.store(OUT + (r[:, None] * o_n + e[None, :]), out, mask=here[:, None] & (e < DV)[None, :])
