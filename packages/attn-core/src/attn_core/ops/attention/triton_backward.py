# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# Kernels are Triton, not Python: constants stand where constexpr is declared, constant conditions decide what is bound.
"""Backward kernels of attention; tiles, tables and argument names as in :mod:`.triton_forward`.

P = exp(s − lse); dP = dO Vᵀ; dS = P∘(dP − δ). Three passes, each owning what it writes: queries (dQ and the axis
tables), keys (dK and dV, over all heads of a group), and tiles of a broadcast dense bias. Every order of summation is
fixed, so two runs give equal bits.
"""

import triton
import triton.language as tl

from attn_core.kernels.tiles import accumulate, load_lse, load_rows, product, store_rows

from .triton_forward import COUNTS, causal_end, load_bound, row_bias, tile_logits


@triton.jit
def score_gradient(
    q, do, lse, delta, K, V, BIAS, MASK, first_j, end_j, DBIAS, axis,
    i0, ii, inside_i, j0, jj, inside_j,
    k_n, v_n, bias_n, bias_m, mask_m, M, scale2, causal_offset,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dS of BM queries and the key tile at token ``j0``, and that tile of K; dS is stored where DBIAS is given."""
    first = tl.cast(j0, tl.int64)
    k = load_rows(K + first * k_n, jj, k_n, inside_j, D, BLOCK_D, MASKED)
    s = tile_logits(
        product(q, tl.trans(k), UPCAST, PRECISION), scale2, axis,
        BIAS + first * bias_m if BIAS is not None else None, MASK + first * mask_m if MASK is not None else None,
        first_j[:, None] if first_j is not None else None, end_j[:, None] if end_j is not None else None,
        i0, ii[:, None], j0, jj[None, :], inside_i[:, None], inside_j[None, :],
        bias_n, bias_m, mask_m, causal_offset, CAUSAL, MASKED,
    )  # fmt: skip
    p = tl.exp2(s - lse[:, None])
    v = load_rows(V + first * v_n, jj, v_n, inside_j, DV, BLOCK_DV, MASKED)
    ds = p * (product(do, tl.trans(v), UPCAST, PRECISION) - delta[:, None])
    if DBIAS is not None:
        pointers = DBIAS + first + (ii.to(tl.int64)[:, None] * M + jj[None, :])
        tl.store(pointers, ds, mask=inside_i[:, None] & inside_j[None, :])
    return ds, k


@triton.jit(do_not_specialize=COUNTS)
def query_kernel(
    Q, K, V, BIAS, MASK, TX, TA, TB,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, bias_b, bias_h, bias_n, bias_m, mask_b, mask_m,
    tx_b, tx_h, tx_n, ta_b, ta_h, ta_n, tb_b, tb_h, tb_n,
    H, GROUP, N, M, W, ROWS, NB, scale2, causal_offset, FIRST, END, range_b,
    DO, LSE, DELTA, do_b, do_h, do_n, scale, NA,
    DQ, DBIAS, DTX, DTA, DTB, dq_b, dq_h, dq_n,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BX: tl.constexpr,
    AXES: tl.constexpr, EVEN: tl.constexpr, CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head, all the keys they see; dQ, rows of dT, and dS if it is the bias's gradient.

    DTX (B, H, N, W), DTA (B, H, N, NA) and DTB (B, H, N, NB) are contiguous, the last two zeros at the start.
    """
    if AXES > 0:
        M = W * ROWS
    tiles = tl.cdiv(N, BM)
    tile = tl.program_id(0) % tiles
    if CAUSAL:
        tile = tiles - 1 - tile
    bh = tl.program_id(0) // tiles
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    i0 = tile * BM
    first = tl.cast(i0, tl.int64)
    ii = tl.arange(0, BM)
    c = tl.arange(0, BN)
    inside_i = i0 + ii < N
    rows = (b * H + h) * N + first
    q = load_rows(Q + (b * q_b + h * q_h + first * q_n), ii, q_n, inside_i, D, BLOCK_D, True)
    do = load_rows(DO + (b * do_b + h * do_h + first * do_n), ii, do_n, inside_i, DV, BLOCK_DV, True)
    lse = load_lse(LSE + rows + ii, inside_i)
    delta = tl.load(DELTA + rows + ii, mask=inside_i, other=0.0)
    K += b * k_b + h // GROUP * k_h
    V += b * v_b + h // GROUP * v_h
    if BIAS is not None:
        BIAS += b * bias_b + h * bias_h + first * bias_n
    if MASK is not None:
        MASK += b * mask_b
    if DBIAS is not None:
        DBIAS += rows * M

    dq = tl.zeros([BM, BLOCK_D], tl.float32)
    if FIRST is not None:
        FIRST += b * range_b + first
        END += b * range_b + first
    first_j = load_bound(FIRST, ii, inside_i, M)
    end_j = load_bound(END, ii, inside_i, 0)
    if FIRST is not None:
        start = tl.min(first_j, 0)
        end = tl.max(end_j, 0)
    else:
        start = 0
        end = causal_end(i0, M, causal_offset, BM, CAUSAL)
    if AXES == 0:
        for j0 in range(start // BN * BN, end, BN):
            ds, k = score_gradient(
                q, do, lse, delta, K, V, BIAS, MASK, first_j, end_j, DBIAS, None,
                i0, ii, inside_i, j0, c, j0 + c < M,
                k_n, v_n, bias_n, bias_m, mask_m, M, scale2, causal_offset,
                D, DV, BLOCK_D, BLOCK_DV, CAUSAL, CAUSAL or not EVEN, UPCAST, PRECISION,
            )  # fmt: skip
            dq = accumulate(ds.to(k.dtype), k, dq, UPCAST, PRECISION)
    else:
        RB: tl.constexpr = BN // BX
        TX += b * tx_b + h * tx_h + first * tx_n
        if AXES > 1:
            TA += b * ta_b + h * ta_h + first * ta_n
        if AXES > 2:
            TB += b * tb_b + h * tb_h + first * tb_n
        down = c // BX
        jj = down * W + c % BX
        row = down[None, :] if RB > 1 else tl.zeros([1, 1], tl.int32)
        for x0 in range(0, W, BX):
            x = x0 + c % BX
            tx = tl.load(TX + (ii[:, None] * tx_n + x[None, :]), mask=inside_i[:, None] & (x < W)[None, :], other=0.0)
            dtx = tl.zeros([BM, BN], tl.float32)
            for r0 in range(start // W // RB * RB, tl.cdiv(end, W), RB):
                axis = tx.to(tl.float32)
                if AXES > 1:
                    axis += row_bias(TA, TB, ii[:, None], r0 + row, inside_i[:, None], ta_n, tb_n, ROWS, NB, AXES)
                ds, k = score_gradient(
                    q, do, lse, delta, K, V, BIAS, MASK, first_j, end_j, DBIAS, axis,
                    i0, ii, inside_i, r0 * W + x0, jj, (x < W) & (r0 + down < ROWS),
                    k_n, v_n, bias_n, bias_m, mask_m, M, scale2, causal_offset,
                    D, DV, BLOCK_D, BLOCK_DV, CAUSAL, CAUSAL or not EVEN, UPCAST, PRECISION,
                )  # fmt: skip
                dq = accumulate(ds.to(k.dtype), k, dq, UPCAST, PRECISION)
                if DTX is not None:
                    dtx += ds
                if DTA is not None or DTB is not None:
                    if RB > 1:
                        row_sum = tl.sum(tl.reshape(ds, [BM, RB, BX]), 2)
                        at = r0 + tl.arange(0, RB)[None, :]
                    else:
                        row_sum = tl.sum(ds, 1)[:, None]
                        at = r0 + tl.zeros([1, 1], tl.int32)
                    inside = inside_i[:, None] & (at < ROWS)
                    # Only this program writes to its rows, and one thread to each entry: additions without a wait
                    # for the old value, in a fixed order.
                    if AXES == 2:
                        if DTA is not None:
                            pointers = DTA + rows * NA + (ii[:, None] * NA + at)
                            tl.atomic_add(pointers, row_sum, mask=inside, sem="relaxed")
                    else:  # rows of the tile share entries: those that do are summed up first
                        for i in tl.static_range(RB):  # pyright: ignore[reportGeneralTypeIssues]
                            if DTA is not None:
                                entry = tl.zeros([BM], tl.int32) + (r0 // NB + i)
                                own = tl.sum(tl.where(inside & (at // NB == entry[:, None]), row_sum, 0.0), 1)
                                pointers = DTA + rows * NA + (ii * NA + entry)
                                tl.atomic_add(pointers, own, mask=inside_i & (entry < NA), sem="relaxed")
                            if DTB is not None:  # from i = NB on this adds nothing
                                own = tl.sum(tl.where(inside & ((at - r0) % NB == i), row_sum, 0.0), 1)
                                pointers = DTB + rows * NB + (ii * NB + (r0 + i) % NB)
                                tl.atomic_add(pointers, own, mask=inside_i, sem="relaxed")
            if DTX is not None:
                cells = x0 + tl.arange(0, BX)
                if RB > 1:
                    sums = tl.sum(tl.reshape(dtx, [BM, RB, BX]), 1)
                else:
                    sums = dtx
                pointers = DTX + rows * W + (ii[:, None] * W + cells[None, :])
                tl.store(pointers, sums, mask=inside_i[:, None] & (cells < W)[None, :])

    if DQ is not None:
        store_rows(DQ + (b * dq_b + h * dq_h + first * dq_n), ii, dq_n, inside_i, dq * scale, D, BLOCK_D)


@triton.jit
def key_tile(index, W, AXES: tl.constexpr, BN: tl.constexpr, BX: tl.constexpr):
    """First token, first grid row and first cell of a key tile; column tiles of one band of rows are neighbours."""
    if AXES == 0:
        j0 = index * BN
        r0 = 0
        x0 = 0
    else:
        across = tl.cdiv(W, BX)
        r0 = index // across * (BN // BX)
        x0 = index % across * BX
        j0 = r0 * W + x0
    return j0, r0, x0


@triton.jit
def axis_tile(
    TX, TA, TB, ii, inside_i, x, row, inside_j, tx_n, ta_n, tb_n, ROWS, NB, AXES: tl.constexpr
):  # fmt: skip
    """Axis bias of a tile from memory; ``ii``, ``x`` and ``row`` orient it. None without axes."""
    if AXES == 0:
        axis = None
    else:
        axis = tl.load(TX + (ii * tx_n + x), mask=inside_i & inside_j, other=0.0).to(tl.float32)
        if AXES > 1:
            axis += row_bias(TA, TB, ii, row, inside_i, ta_n, tb_n, ROWS, NB, AXES)
    return axis


@triton.jit
def take_queries(
    k, v, dk, dv, Q, DO, LSE, DELTA, BIAS, MASK, TX, TA, TB, FIRST, END,
    i0, ii, j0, jj, inside_j, x, row,
    q_n, do_n, bias_n, bias_m, mask_m, tx_n, ta_n, tb_n, N, M, ROWS, NB, scale2, causal_offset,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    AXES: tl.constexpr, CAUSAL: tl.constexpr, WANT_K: tl.constexpr, WANT_V: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the share of BM queries to dK and dV of a key tile; the scores are held transposed, (BN, BM)."""
    first = tl.cast(i0, tl.int64)
    inside_i = i0 + ii < N
    q = load_rows(Q + first * q_n, ii, q_n, inside_i, D, BLOCK_D, True)
    lse = load_lse(LSE + i0 + ii, inside_i)
    axis = axis_tile(
        TX + first * tx_n if TX is not None else None,
        TA + first * ta_n if TA is not None else None,
        TB + first * tb_n if TB is not None else None,
        ii[None, :], inside_i[None, :], x[:, None], row, inside_j[:, None], tx_n, ta_n, tb_n, ROWS, NB, AXES,
    )  # fmt: skip
    first_j = load_bound(FIRST + i0 if FIRST is not None else None, ii, inside_i, M)
    end_j = load_bound(END + i0 if END is not None else None, ii, inside_i, 0)
    # Keys outside need no mask here: each has its own row of dK and dV, and these rows are not stored.
    s = tile_logits(
        product(k, tl.trans(q), UPCAST, PRECISION), scale2, axis,
        BIAS + first * bias_n if BIAS is not None else None, MASK,
        first_j[None, :] if first_j is not None else None, end_j[None, :] if end_j is not None else None,
        i0, ii[None, :], j0, jj[:, None], inside_i[None, :], inside_j[:, None],
        bias_n, bias_m, mask_m, causal_offset, CAUSAL, CAUSAL,
    )  # fmt: skip
    p = tl.exp2(s - lse[None, :])
    do = load_rows(DO + first * do_n, ii, do_n, inside_i, DV, BLOCK_DV, True)
    if WANT_V:
        dv = accumulate(p.to(do.dtype), do, dv, UPCAST, PRECISION)
    if WANT_K:
        delta = tl.load(DELTA + i0 + ii, mask=inside_i, other=0.0)
        ds = p * (product(v, tl.trans(do), UPCAST, PRECISION) - delta[None, :])
        dk = accumulate(ds.to(q.dtype), q, dk, UPCAST, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def key_kernel(
    Q, K, V, BIAS, MASK, TX, TA, TB,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, bias_b, bias_h, bias_n, bias_m, mask_b, mask_m,
    tx_b, tx_h, tx_n, ta_b, ta_h, ta_n, tb_b, tb_h, tb_n,
    H, GROUP, N, M, W, ROWS, NB, scale2, causal_offset, FIRST, END, range_b,
    DO, LSE, DELTA, do_b, do_h, do_n, scale, tiles, LOW, HIGH, low_b,
    DK, DVAL, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BX: tl.constexpr,
    AXES: tl.constexpr, CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dK, dV or both of one key tile of one key head, over the queries of every head of its group."""
    if AXES > 0:
        M = W * ROWS
    j0, r0, x0 = key_tile(tl.program_id(0) % tiles, W, AXES, BN, BX)
    heads = H // GROUP
    bh = tl.program_id(0) // tiles
    b = (bh // heads).to(tl.int64)
    hk = (bh % heads).to(tl.int64)
    ii = tl.arange(0, BM)
    c = tl.arange(0, BN)
    if AXES == 0:
        jj = c
        x = c
        row = tl.zeros([1, 1], tl.int32)
        inside_j = j0 + c < M
    else:
        down = c // BX
        jj = down * W + c % BX
        x = x0 + c % BX
        row = r0 + (down[:, None] if BN > BX else tl.zeros([1, 1], tl.int32))
        inside_j = (x < W) & (r0 + down < ROWS)
    first = tl.cast(j0, tl.int64)
    k = load_rows(K + (b * k_b + hk * k_h + first * k_n), jj, k_n, inside_j, D, BLOCK_D, True)
    v = load_rows(V + (b * v_b + hk * v_h + first * v_n), jj, v_n, inside_j, DV, BLOCK_DV, True)
    if MASK is not None:
        MASK += b * mask_b + first * mask_m

    WANT_K: tl.constexpr = DK is not None
    WANT_V: tl.constexpr = DVAL is not None
    # A loop cannot carry None.
    dk = tl.zeros([BN, BLOCK_D] if WANT_K else [1, 1], tl.float32)
    dv = tl.zeros([BN, BLOCK_DV] if WANT_V else [1, 1], tl.float32)
    if (
        LOW is not None
    ):  # the queries that may see a key of the tile: those of its first and its last key, as both go up
        start = tl.min(tl.load(LOW + b * low_b + j0 + jj, mask=inside_j, other=N), 0) // BM * BM
        end = tl.max(tl.load(HIGH + b * low_b + j0 + jj, mask=inside_j, other=0), 0)
        FIRST += b * range_b
        END += b * range_b
    else:
        start = tl.maximum(0, j0 - causal_offset) // BM * BM if CAUSAL else 0
        end = N
    for g in range(GROUP):
        h = hk * GROUP + g
        rows = (b * H + h) * N
        Qh = Q + (b * q_b + h * q_h)
        DOh = DO + (b * do_b + h * do_h)
        BIASh = BIAS + (b * bias_b + h * bias_h + first * bias_m) if BIAS is not None else None
        TXh = TX + (b * tx_b + h * tx_h) if AXES > 0 else None
        TAh = TA + (b * ta_b + h * ta_h) if AXES > 1 else None
        TBh = TB + (b * tb_b + h * tb_h) if AXES > 2 else None
        for i0 in range(start, end, BM):
            dk, dv = take_queries(
                k, v, dk, dv, Qh, DOh, LSE + rows, DELTA + rows, BIASh, MASK, TXh, TAh, TBh, FIRST, END,
                i0, ii, j0, jj, inside_j, x, row,
                q_n, do_n, bias_n, bias_m, mask_m, tx_n, ta_n, tb_n, N, M, ROWS, NB, scale2, causal_offset,
                D, DV, BLOCK_D, BLOCK_DV, AXES, CAUSAL, WANT_K, WANT_V, UPCAST, PRECISION,
            )  # fmt: skip
    if WANT_K:
        store_rows(DK + (b * dk_b + hk * dk_h + first * dk_n), jj, dk_n, inside_j, dk * scale, D, BLOCK_D)
    if WANT_V:
        store_rows(DVAL + (b * dv_b + hk * dv_h + first * dv_n), jj, dv_n, inside_j, dv, DV, BLOCK_DV)


@triton.jit(do_not_specialize=COUNTS)
def bias_kernel(
    Q, K, V, BIAS, MASK, TX, TA, TB,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, bias_b, bias_h, bias_n, bias_m, mask_b, mask_m,
    tx_b, tx_h, tx_n, ta_b, ta_h, ta_n, tb_b, tb_h, tb_n,
    H, GROUP, N, M, W, ROWS, NB, scale2, causal_offset, FIRST, END, range_b,
    DO, LSE, DELTA, do_b, do_h, do_n,
    own_h, own_i, own_j, sum_b, sum_h, sum_i, sum_j,
    DBIAS,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BX: tl.constexpr,
    AXES: tl.constexpr, SUM_N: tl.constexpr, SUM_M: tl.constexpr, CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one tile of the gradient of a broadcast bias, summed over the dimensions in which it is broadcast.

    Along heads, query tiles and key tiles there are ``own_*`` programs and ``sum_*`` steps; one of each pair is 1, and
    the sum over the batch has ``sum_b`` steps. DBIAS is contiguous, in the shape of the bias.
    """
    if AXES > 0:
        M = W * ROWS
    pid = tl.program_id(0)
    jt = pid % own_j
    it = pid // own_j % own_i
    ho = pid // (own_j * own_i) % own_h
    bo = pid // (own_j * own_i * own_h)
    ii = tl.arange(0, BM)
    c = tl.arange(0, BN)
    total = tl.zeros([BM, BN], tl.float32)
    for e in range(sum_b * sum_h * sum_i * sum_j):
        j0, r0, x0 = key_tile(jt + e % sum_j, W, AXES, BN, BX)
        i0 = (it + e // sum_j % sum_i) * BM
        h = (ho + e // (sum_j * sum_i) % sum_h).to(tl.int64)
        b = (bo + e // (sum_j * sum_i * sum_h)).to(tl.int64)
        first = tl.cast(i0, tl.int64)
        inside_i = i0 + ii < N
        rows = (b * H + h) * N + first
        if AXES == 0:
            jj = c
            x = c
            row = tl.zeros([1, 1], tl.int32)
            inside_j = j0 + c < M
        else:
            down = c // BX
            jj = down * W + c % BX
            x = x0 + c % BX
            row = r0 + (down[None, :] if BN > BX else tl.zeros([1, 1], tl.int32))
            inside_j = (x < W) & (r0 + down < ROWS)
        axis = axis_tile(
            TX + (b * tx_b + h * tx_h + first * tx_n) if AXES > 0 else None,
            TA + (b * ta_b + h * ta_h + first * ta_n) if AXES > 1 else None,
            TB + (b * tb_b + h * tb_h + first * tb_n) if AXES > 2 else None,
            ii[:, None], inside_i[:, None], x[None, :], row, inside_j[None, :], tx_n, ta_n, tb_n, ROWS, NB, AXES,
        )  # fmt: skip
        first_j = load_bound(FIRST + b * range_b + i0 if FIRST is not None else None, ii, inside_i, M)
        end_j = load_bound(END + b * range_b + i0 if END is not None else None, ii, inside_i, 0)
        ds, _ = score_gradient(
            load_rows(Q + (b * q_b + h * q_h + first * q_n), ii, q_n, inside_i, D, BLOCK_D, True),
            load_rows(DO + (b * do_b + h * do_h + first * do_n), ii, do_n, inside_i, DV, BLOCK_DV, True),
            load_lse(LSE + rows + ii, inside_i), tl.load(DELTA + rows + ii, mask=inside_i, other=0.0),
            K + (b * k_b + h // GROUP * k_h), V + (b * v_b + h // GROUP * v_h),
            BIAS + (b * bias_b + h * bias_h + first * bias_n), MASK + b * mask_b if MASK is not None else None,
            first_j, end_j, None, axis, i0, ii, inside_i, j0, jj, inside_j,
            k_n, v_n, bias_n, bias_m, mask_m, M, scale2, causal_offset,
            D, DV, BLOCK_D, BLOCK_DV, CAUSAL, True, UPCAST, PRECISION,
        )  # fmt: skip
        total += ds
    DBIAS += (bo * own_h + ho).to(tl.int64) * (1 if SUM_N else N) * (1 if SUM_M else M)
    i = it * BM + ii
    j0, r0, x0 = key_tile(jt, W, AXES, BN, BX)
    if AXES == 0:
        j = j0 + c
        inside_j = j < M
    else:
        j = j0 + c // BX * W + c % BX
        inside_j = (x0 + c % BX < W) & (r0 + c // BX < ROWS)
    if SUM_N and SUM_M:
        tl.store(DBIAS, tl.sum(tl.sum(total, 1), 0))
    elif SUM_N:
        tl.store(DBIAS + j, tl.sum(total, 0), mask=inside_j)
    elif SUM_M:
        tl.store(DBIAS + i, tl.sum(total, 1), mask=i < N)
    else:
        pointers = DBIAS + (i.to(tl.int64)[:, None] * M + j[None, :])
        tl.store(pointers, total, mask=(i < N)[:, None] & inside_j[None, :])
