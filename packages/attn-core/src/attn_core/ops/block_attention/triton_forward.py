# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# Kernels are Triton, not Python: constants stand where constexpr is declared, constant conditions decide what is bound.
"""Forward kernel of block attention, and the pieces its backward kernels share.

A program owns BM slots of one query block. It walks the keys in tiles of BN columns, RB = BN/BX table slots of BX key
slots each, so that small key blocks (BiFormer's last stages: 16 or 4 tokens) still fill a tile::

    column c of a tile  →  table slot s0 + c // BX, key slot x0 + c % BX

Rows and keys are reached through their token numbers: two dependent loads, an int32 and then the row. Holes are −1.
"""

import triton
import triton.language as tl

from attn_core.kernels.tiles import LOG2E, accumulate, finish, product, softmax_step


@triton.jit
def load_tokens(base, token, stride, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """(tokens, BLOCK) rows; holes and columns from WIDTH on are 0. Offsets are int64: tokens come in any order."""
    column = tl.arange(0, BLOCK)
    pointers = base + (tl.where(inside, token, 0).to(tl.int64)[:, None] * stride + column[None, :])
    if WIDTH == BLOCK:
        tile = tl.load(pointers, mask=inside[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=inside[:, None] & (column < WIDTH)[None, :], other=0.0)
    return tile


@triton.jit
def store_tokens(base, token, stride, inside, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Write a tile's rows ``inside`` to the tokens that they belong to."""
    column = tl.arange(0, BLOCK)
    pointers = base + (tl.where(inside, token, 0).to(tl.int64)[:, None] * stride + column[None, :])
    tl.store(pointers, value, mask=inside[:, None] & (column < WIDTH)[None, :])


@triton.jit
def positions(POS, token, inside):
    """Positions of tokens: their numbers, unless given."""
    if POS is None:
        at = token
    else:
        at = tl.load(POS + tl.where(inside, token, 0), mask=inside, other=0)
    return at


@triton.jit
def coordinate(x, axis: tl.constexpr, AXES: tl.constexpr, C1, C2):
    """Coordinate of key slot ``x`` along an axis of the grid (·, C1) or (·, C1, C2), last axis fastest."""
    if AXES == 1:
        at = x
    elif AXES == 2:
        at = x // C1 if axis == 0 else x % C1
    else:
        at = x // (C1 * C2) if axis == 0 else (x // C2 % C1 if axis == 1 else x % C2)
    return at


@triton.jit
def slot_bias(
    T0, T1, T2, t0_n, t1_n, t2_n, token, x, inside, C1, C2, AXES: tl.constexpr
):  # fmt: skip
    """Axis bias of a tile of tokens and key slots; ``token`` and ``x`` orient it."""
    if AXES == 0:
        bias = None
    else:
        bias = tl.load(T0 + (token * t0_n + coordinate(x, 0, AXES, C1, C2)), mask=inside, other=0.0).to(tl.float32)
        if AXES > 1:
            bias += tl.load(T1 + (token * t1_n + coordinate(x, 1, AXES, C1, C2)), mask=inside, other=0.0)
        if AXES > 2:
            bias += tl.load(T2 + (token * t2_n + coordinate(x, 2, AXES, C1, C2)), mask=inside, other=0.0)
    return bias


@triton.jit
def tile_logits(
    s, scale2, weight, bias, self2, q_at, k_at, inside_j,
    CAUSAL: tl.constexpr, SELF: tl.constexpr,
):  # fmt: skip
    """Base-2 logits of a tile of dot products; the other operands broadcast against it."""
    s = s * scale2
    if weight is not None:
        s *= weight
    if bias is not None:
        s += bias * LOG2E
    if SELF:
        s = tl.where(q_at == k_at, self2, s)
    s = tl.where(inside_j, s, float("-inf"))
    if CAUSAL:
        s = tl.where(k_at <= q_at, s, float("-inf"))
    return s


@triton.jit
def key_tokens(TABLE, KI, r, slot, x, KS, J, IDENTITY: tl.constexpr):
    """Tokens of key slots ``x`` of the blocks in table slots ``slot`` of query block ``r``; −1 for holes."""
    if IDENTITY:
        block = tl.where(slot == 0, r, -1)
    else:
        block = tl.load(TABLE + r * KS + slot, mask=slot < KS, other=-1)
    inside = (block >= 0) & (x < J)
    return tl.load(KI + tl.where(inside, block * J + x, 0), mask=inside, other=-1)


@triton.jit(do_not_specialize=["R", "I", "J", "KS", "C1", "C2", "ROWS"])
def forward_kernel(
    Q, K, V, QI, KI, TABLE, WEIGHT, QPOS, KPOS, T0, T1, T2,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    qi_b, qi_h, ki_b, ki_h, table_b, table_h, weight_b, weight_h, qpos_b, kpos_b,
    t0_b, t0_h, t0_n, t1_b, t1_h, t1_n, t2_b, t2_h, t2_n,
    H, GROUP, R, I, J, KS, C1, C2, ROWS, scale2, self2,
    OUT, LSE, o_b, o_h, o_n,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BX: tl.constexpr,
    AXES: tl.constexpr, IDENTITY: tl.constexpr, PER_ROW: tl.constexpr,
    CAUSAL: tl.constexpr, SELF: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM slots of one query block of one head. Results go to the slot's token, or to the slot (PER_ROW).

    ROWS is the number of results per head: tokens, or slots.
    """
    tiles = tl.cdiv(I, BM)
    i0 = tl.program_id(0) % tiles * BM
    r = tl.program_id(0) // tiles % R
    bh = tl.program_id(0) // (tiles * R)
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    hk = h // GROUP
    i = i0 + tl.arange(0, BM)
    c = tl.arange(0, BN)
    token = tl.load(QI + (b * qi_b + h * qi_h) + r * I + i, mask=i < I, other=-1)
    inside_i = token >= 0
    q = load_tokens(Q + (b * q_b + h * q_h), token, q_n, inside_i, D, BLOCK_D)
    q_at = positions(QPOS + b * qpos_b if QPOS is not None else None, token, inside_i)
    K += b * k_b + hk * k_h
    V += b * v_b + hk * v_h
    KI += b * ki_b + hk * ki_h
    if not IDENTITY:
        TABLE += b * table_b + h * table_h
    if WEIGHT is not None:
        WEIGHT += b * weight_b + h * weight_h + r * KS
    row64 = tl.where(inside_i, token, 0).to(tl.int64)[:, None]

    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_DV], tl.float32)
    for x0 in range(0, J, BX):
        x = x0 + c % BX
        bias = slot_bias(
            T0 + (b * t0_b + h * t0_h) if AXES > 0 else None,
            T1 + (b * t1_b + h * t1_h) if AXES > 1 else None,
            T2 + (b * t2_b + h * t2_h) if AXES > 2 else None,
            t0_n, t1_n, t2_n, row64, x[None, :], inside_i[:, None] & (x < J)[None, :], C1, C2, AXES,
        )  # fmt: skip
        for s0 in range(0, KS, BN // BX):
            slot = s0 + c // BX
            u = key_tokens(TABLE, KI, r, slot, x, KS, J, IDENTITY)
            inside_j = u >= 0
            k_at = positions(KPOS + b * kpos_b if KPOS is not None else None, u, inside_j)
            k = load_tokens(K, u, k_n, inside_j, D, BLOCK_D)
            weight = (
                tl.load(WEIGHT + slot, mask=slot < KS, other=0.0).to(tl.float32)[None, :]
                if WEIGHT is not None
                else None
            )
            s = tile_logits(
                product(q, tl.trans(k), UPCAST, PRECISION), scale2, weight, bias, self2,
                q_at[:, None], k_at[None, :], inside_j[None, :], CAUSAL, SELF,
            )  # fmt: skip
            p, decay, m, total = softmax_step(s, m, total)
            v = load_tokens(V, u, v_n, inside_j, DV, BLOCK_DV)
            if WEIGHT is not None:
                p *= weight
            acc = accumulate(p.to(v.dtype), v, acc * decay[:, None], UPCAST, PRECISION)

    out, lse = finish(acc, m, total)
    OUT += b * o_b + h * o_h
    LSE += (b * H + h) * ROWS
    if PER_ROW:
        row = r * I + i
        store_tokens(OUT, row, o_n, i < I, tl.where(inside_i[:, None], out, 0.0), DV, BLOCK_DV)
        tl.store(LSE + row, tl.where(inside_i, lse, float("-inf")), mask=i < I)
    else:
        store_tokens(OUT, token, o_n, inside_i, out, DV, BLOCK_DV)
        tl.store(LSE + token, lse, mask=inside_i)
