# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# Kernels are Triton, not Python: constants stand where constexpr is declared, constant conditions decide what is bound.
"""Backward kernels of block attention; tiles and argument names as in :mod:`.triton_forward`.

Queries own dQ, the axis tables' rows and the weights' gradient. Keys walk the table's inverse: for each key block, the
(query block, slot) pairs that list it, in order. Where a token stands in several blocks, each block leaves its share in
a float32 buffer, and :func:`reduce_kernel` adds up the shares of each token. Every order of summation is fixed.
"""

import triton
import triton.language as tl

from attn_core.kernels.tiles import accumulate, load_lse, product

from .triton_forward import coordinate, key_tokens, load_tokens, positions, slot_bias, store_tokens, tile_logits


@triton.jit
def add_to_table(
    gradient, total, at, BLOCK: tl.constexpr, DTYPE: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr
):
    """total[:, n] += Σ of the columns of ``gradient`` whose coordinate ``at`` is n: a product with one-hot columns."""
    hot = (at[:, None] == tl.arange(0, BLOCK)[None, :]).to(DTYPE)
    return accumulate(gradient.to(DTYPE), hot, total, UPCAST, PRECISION)


@triton.jit
def store_table(DT, row, size, inside, value, BLOCK: tl.constexpr):
    """Write the gradient of one axis' bias, rows ``inside``."""
    n = tl.arange(0, BLOCK)
    pointers = DT + (tl.where(inside, row, 0).to(tl.int64)[:, None] * size + n[None, :])
    tl.store(pointers, value, mask=inside[:, None] & (n < size)[None, :])


@triton.jit(do_not_specialize=["R", "I", "J", "KS", "C1", "C2", "ROWS", "n0"])
def query_kernel(
    Q, K, V, QI, KI, TABLE, WEIGHT, QPOS, KPOS, T0, T1, T2,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    qi_b, qi_h, ki_b, ki_h, table_b, table_h, weight_b, weight_h, qpos_b, kpos_b,
    t0_b, t0_h, t0_n, t1_b, t1_h, t1_n, t2_b, t2_h, t2_n,
    H, GROUP, R, I, J, KS, C1, C2, ROWS, scale2, self2,
    DO, LSE, DELTA, do_b, do_h, do_n, scale,
    DQ, DWEIGHT, DT0, DT1, DT2, dq_b, dq_h, dq_n, n0,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BX: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr,
    AXES: tl.constexpr, IDENTITY: tl.constexpr, PER_ROW: tl.constexpr,
    CAUSAL: tl.constexpr, SELF: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM slots of one query block. DQ and DT* have one row per token, or per slot (PER_ROW).

    DT* (B, H, ROWS, n_a) and DWEIGHT (B, H, R, row tiles, column tiles, KS) are contiguous. With several axes the
    tables' gradients stay in registers, padded to N0, N1 and N2 columns.
    """
    tiles = tl.cdiv(I, BM)
    tile = tl.program_id(0) % tiles
    r = tl.program_id(0) // tiles % R
    bh = tl.program_id(0) // (tiles * R)
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    hk = h // GROUP
    i = tile * BM + tl.arange(0, BM)
    c = tl.arange(0, BN)
    RB: tl.constexpr = BN // BX
    token = tl.load(QI + (b * qi_b + h * qi_h) + r * I + i, mask=i < I, other=-1)
    inside_i = token >= 0
    row = r * I + i if PER_ROW else token
    written = i < I if PER_ROW else inside_i
    q = load_tokens(Q + (b * q_b + h * q_h), token, q_n, inside_i, D, BLOCK_D)
    do = load_tokens(DO + (b * do_b + h * do_h), row, do_n, inside_i, DV, BLOCK_DV)
    at = (b * H + h) * ROWS + tl.where(inside_i, row, 0)
    lse = load_lse(LSE + at, inside_i)
    delta = tl.load(DELTA + at, mask=inside_i, other=0.0)
    q_at = positions(QPOS + b * qpos_b if QPOS is not None else None, token, inside_i)
    K += b * k_b + hk * k_h
    V += b * v_b + hk * v_h
    KI += b * ki_b + hk * ki_h
    if not IDENTITY:
        TABLE += b * table_b + h * table_h
    if WEIGHT is not None:
        WEIGHT += b * weight_b + h * weight_h + r * KS
    row64 = tl.where(inside_i, token, 0).to(tl.int64)[:, None]
    first = (b * H + h) * ROWS  # row of DT*

    dq = tl.zeros([BM, BLOCK_D], tl.float32)
    if AXES > 1:
        dt0 = tl.zeros([BM, N0], tl.float32)
        dt1 = tl.zeros([BM, N1], tl.float32)
        dt2 = tl.zeros([BM, N2], tl.float32)
    for x0 in range(0, J, BX):
        x = x0 + c % BX
        bias = slot_bias(
            T0 + (b * t0_b + h * t0_h) if AXES > 0 else None,
            T1 + (b * t1_b + h * t1_h) if AXES > 1 else None,
            T2 + (b * t2_b + h * t2_h) if AXES > 2 else None,
            t0_n, t1_n, t2_n, row64, x[None, :], inside_i[:, None] & (x < J)[None, :], C1, C2, AXES,
        )  # fmt: skip
        if AXES > 0:
            dbias = tl.zeros([BM, BN], tl.float32)
        for s0 in range(0, KS, RB):
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
            dots = product(q, tl.trans(k), UPCAST, PRECISION)
            s = tile_logits(
                dots, scale2, weight, bias, self2, q_at[:, None], k_at[None, :], inside_j[None, :], CAUSAL, SELF
            )  # fmt: skip
            p = tl.exp2(s - lse[:, None])
            v = load_tokens(V, u, v_n, inside_j, DV, BLOCK_DV)
            dp = product(do, tl.trans(v), UPCAST, PRECISION)
            if WEIGHT is not None:
                ds = p * (dp * weight - delta[:, None])
            else:
                ds = p * (dp - delta[:, None])
            if SELF:  # a replaced logit passes nothing on
                ds = tl.where(q_at[:, None] == k_at[None, :], 0.0, ds)
            if DWEIGHT is not None:
                share = tl.sum(ds * dots * scale + p * dp, 0)
                if RB > 1:
                    share = tl.sum(tl.reshape(share, [RB, BX]), 1)
                    to = s0 + tl.arange(0, RB)
                else:
                    share = tl.sum(tl.reshape(share, [1, BX]), 1)
                    to = s0 + tl.arange(0, 1)
                base = (((b * H + h) * R + r) * tiles + tile) * tl.cdiv(J, BX) + x0 // BX
                tl.store(DWEIGHT + base * KS + to, share, mask=to < KS)
            if AXES > 0:
                dbias += ds
            if WEIGHT is not None:
                ds *= weight
            if DQ is not None:
                dq = accumulate(ds.to(k.dtype), k, dq, UPCAST, PRECISION)
        if AXES == 1:
            if DT0 is not None:
                cells = x0 + tl.arange(0, BX)
                if RB > 1:
                    sums = tl.sum(tl.reshape(dbias, [BM, RB, BX]), 1)
                else:
                    sums = dbias
                pointers = DT0 + first * J + (tl.where(written, row, 0).to(tl.int64)[:, None] * J + cells[None, :])
                tl.store(pointers, sums, mask=written[:, None] & (cells < J)[None, :])
        elif AXES > 1:
            if DT0 is not None:
                dt0 = add_to_table(dbias, dt0, coordinate(x, 0, AXES, C1, C2), N0, q.dtype, UPCAST, PRECISION)
            if DT1 is not None:
                dt1 = add_to_table(dbias, dt1, coordinate(x, 1, AXES, C1, C2), N1, q.dtype, UPCAST, PRECISION)
            if DT2 is not None:
                dt2 = add_to_table(dbias, dt2, coordinate(x, 2, AXES, C1, C2), N2, q.dtype, UPCAST, PRECISION)

    if DQ is not None:
        store_tokens(DQ + (b * dq_b + h * dq_h), row, dq_n, written, dq * scale, D, BLOCK_D)
    if AXES > 1:
        if DT0 is not None:
            store_table(DT0 + first * n0, row, n0, written, dt0, N0)
        if DT1 is not None:
            store_table(DT1 + first * C1, row, C1, written, dt1, N1)
        if DT2 is not None:
            store_table(DT2 + first * C2, row, C2, written, dt2, N2)


@triton.jit(do_not_specialize=["R", "I", "J", "KS", "C1", "C2", "ROWS", "S"])
def key_kernel(
    Q, K, V, QI, KI, TABLE, WEIGHT, QPOS, KPOS, T0, T1, T2,  # noqa: ARG001  as the others' arguments
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    qi_b, qi_h, ki_b, ki_h, table_b, table_h, weight_b, weight_h, qpos_b, kpos_b,  # noqa: ARG001  as the others' arguments
    t0_b, t0_h, t0_n, t1_b, t1_h, t1_n, t2_b, t2_h, t2_n,
    H, GROUP, R, I, J, KS, C1, C2, ROWS, scale2, self2,  # noqa: ARG001  as the others' arguments
    DO, LSE, DELTA, do_b, do_h, do_n, scale,
    ORDER, START, order_b, order_h, start_b, start_h, S,
    DK, DVAL, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BI: tl.constexpr,
    AXES: tl.constexpr, IDENTITY: tl.constexpr, PER_ROW: tl.constexpr, DISJOINT: tl.constexpr,
    CAUSAL: tl.constexpr, SELF: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dK, dV or both of BN key slots of one key block and key head, over the query blocks that list it.

    ORDER[START[s] : START[s + 1]] are the numbers r·KS + slot of the table entries equal to s. A tile holds BM/BI
    entries of BI query slots. Gradients go to the key's token if blocks are DISJOINT, else to its slot.
    """
    tiles = tl.cdiv(J, BN)
    heads = H // GROUP
    x = tl.program_id(0) % tiles * BN + tl.arange(0, BN)
    block = tl.program_id(0) // tiles % S
    bh = tl.program_id(0) // (tiles * S)
    b = (bh // heads).to(tl.int64)
    hk = (bh % heads).to(tl.int64)
    u = tl.load(KI + (b * ki_b + hk * ki_h) + block * J + x, mask=x < J, other=-1)
    inside_j = u >= 0
    k = load_tokens(K + (b * k_b + hk * k_h), u, k_n, inside_j, D, BLOCK_D)
    v = load_tokens(V + (b * v_b + hk * v_h), u, v_n, inside_j, DV, BLOCK_DV)
    k_at = positions(KPOS + b * kpos_b if KPOS is not None else None, u, inside_j)
    c = tl.arange(0, BM)
    steps_per_entry = tl.cdiv(I, BI)

    dk = tl.zeros([BN, BLOCK_D], tl.float32) if DK is not None else None
    dv = tl.zeros([BN, BLOCK_DV], tl.float32) if DVAL is not None else None
    for g in range(GROUP):
        h = hk * GROUP + g
        if IDENTITY:
            begin = block
            end = block + 1
        else:
            begin = tl.load(START + (b * start_b + h * start_h) + block)
            end = tl.load(START + (b * start_b + h * start_h) + block + 1)
        for step in range(tl.cdiv(end - begin, BM // BI) * steps_per_entry):
            entry = begin + step // steps_per_entry * (BM // BI) + c // BI
            i = step % steps_per_entry * BI + c % BI
            known = (entry < end) & (i < I)
            if not IDENTITY:
                entry = tl.load(ORDER + (b * order_b + h * order_h) + entry, mask=known, other=0).to(tl.int32)
            r = entry // KS
            token = tl.load(QI + (b * qi_b + h * qi_h) + r * I + i, mask=known, other=-1)
            inside_i = token >= 0
            row = r * I + i if PER_ROW else token
            at = (b * H + h) * ROWS + tl.where(inside_i, row, 0)
            q = load_tokens(Q + (b * q_b + h * q_h), token, q_n, inside_i, D, BLOCK_D)
            lse = load_lse(LSE + at, inside_i)
            q_at = positions(QPOS + b * qpos_b if QPOS is not None else None, token, inside_i)
            if WEIGHT is not None:
                weight = tl.load(WEIGHT + (b * weight_b + h * weight_h) + entry, mask=known, other=0.0)
                weight = weight.to(tl.float32)[None, :]
            else:
                weight = None
            bias = slot_bias(
                T0 + (b * t0_b + h * t0_h) if AXES > 0 else None,
                T1 + (b * t1_b + h * t1_h) if AXES > 1 else None,
                T2 + (b * t2_b + h * t2_h) if AXES > 2 else None,
                t0_n, t1_n, t2_n, tl.where(inside_i, token, 0).to(tl.int64)[None, :], x[:, None],
                inside_i[None, :] & (x < J)[:, None], C1, C2, AXES,
            )  # fmt: skip
            s = tile_logits(
                product(k, tl.trans(q), UPCAST, PRECISION), scale2, weight, bias, self2,
                q_at[None, :], k_at[:, None], inside_j[:, None], CAUSAL, SELF,
            )  # fmt: skip
            p = tl.exp2(s - lse[None, :])
            do = load_tokens(DO + (b * do_b + h * do_h), row, do_n, inside_i, DV, BLOCK_DV)
            delta = tl.load(DELTA + at, mask=inside_i, other=0.0)
            dp = product(v, tl.trans(do), UPCAST, PRECISION)
            if WEIGHT is not None:
                ds = p * (dp * weight - delta[None, :])
                p *= weight
            else:
                ds = p * (dp - delta[None, :])
            if SELF:
                ds = tl.where(q_at[None, :] == k_at[:, None], 0.0, ds)
            if WEIGHT is not None:
                ds *= weight
            if DVAL is not None:
                dv = accumulate(p.to(do.dtype), do, dv, UPCAST, PRECISION)
            if DK is not None:
                dk = accumulate(ds.to(q.dtype), q, dk, UPCAST, PRECISION)

    to = u if DISJOINT else block * J + x
    written = inside_j if DISJOINT else x < J
    if DK is not None:
        store_tokens(DK + (b * dk_b + hk * dk_h), to, dk_n, written, dk * scale, D, BLOCK_D)
    if DVAL is not None:
        store_tokens(DVAL + (b * dv_b + hk * dv_h), to, dv_n, written, dv, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["SLOTS"])
def reduce_kernel(
    SHARES, ORDER, START, OUT, order_b, order_h, start_b, start_h, o_b, o_h, o_n, H, N, SLOTS,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """OUT[token] = Σ SHARES[slot] over the slots ORDER[START[token] : START[token + 1]], in that order.

    SHARES (B, H, SLOTS, WIDTH) is contiguous float32; a token in no slot gets 0.
    """
    tiles = tl.cdiv(N, BM)
    t = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    bh = tl.program_id(0) // tiles
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    inside = t < N
    START += b * start_b + h * start_h
    begin = tl.load(START + t, mask=inside, other=0)
    count = tl.load(START + t + 1, mask=inside, other=0) - begin
    total = tl.zeros([BM, BLOCK], tl.float32)
    for e in range(tl.max(count, 0)):
        live = e < count
        slot = tl.load(ORDER + (b * order_b + h * order_h) + begin + e, mask=live, other=-1).to(tl.int32)
        total += load_tokens(SHARES + (b * H + h) * SLOTS * WIDTH, slot, WIDTH, live, WIDTH, BLOCK)
    store_tokens(OUT + (b * o_b + h * o_h), t, o_n, inside, total, WIDTH, BLOCK)
