# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# Kernels are Triton, not Python: constants stand where constexpr is declared, constant conditions decide what is bound.
"""Forward kernel of attention, and the logits of one tile, which the backward kernels share.

Keys are walked in tiles of BN. Without axis bias a tile is BN consecutive keys. With it the keys form a grid of ROWS
rows of W cells, and a tile is RB = BN/BX rows of BX cells, so that the bias of the last axis stays in registers while
the loop goes down the rows, and no key needs a division to find its coordinates::

    column c of a tile  →  row r0 + c // BX, cell x0 + c % BX, key (r0 + c // BX)·W + x0 + c % BX

Where FIRST and END are given (packed sequences, windows), query i sees keys FIRST[i] … END[i] − 1 and no others; both
go one way, so a tile of queries walks the keys from its first FIRST to its last END. Causality is then in them.

TX is the table of the last axis (W entries per query); TA holds one entry per grid row, or with three axes one per
``row // NB``, and TB one per ``row % NB``.
"""

import triton
import triton.language as tl

from attn_core.kernels.tiles import LOG2E, accumulate, finish, load_rows, product, softmax_step, store_rows

# What changes from image to image, strides of tables included: no value of it is worth a compiled kernel of its own. M
# and N are not among them: multiples of 16 are read in wide loads, and cost one more form.
COUNTS = ["W", "ROWS", "NB", "NA", "tiles", "causal_offset", "own_h", "own_i", "own_j",
          *(f"{table}_{stride}" for table in ("tx", "ta", "tb") for stride in "bhn")]  # fmt: skip


@triton.jit
def tile_logits(
    s, scale2, axis,
    BIAS, MASK, first_j, end_j, i0, ii, j0, jj, inside_i, inside_j,
    bias_n, bias_m, mask_m, causal_offset,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Base-2 logits of a tile of dot products; ``ii`` and ``jj`` orient it: (BM, 1) and (1, BN), or the transpose.

    BIAS points to element (i0, j0), MASK to j0. Keys outside are hidden, and causality applied, only if MASKED.
    """
    s = s * scale2
    if BIAS is not None:
        bias = tl.load(BIAS + (ii * bias_n + jj * bias_m), mask=inside_i & inside_j, other=0.0)
        s += bias.to(tl.float32) * LOG2E
    if axis is not None:
        s += axis * LOG2E
    if MASK is not None:
        s = tl.where(tl.load(MASK + jj * mask_m, mask=inside_j, other=0) != 0, s, float("-inf"))
    elif MASKED:
        s = tl.where(inside_j, s, float("-inf"))
    if CAUSAL and MASKED:
        s = tl.where(j0 + jj <= i0 + ii + causal_offset, s, float("-inf"))
    if first_j is not None:
        s = tl.where((first_j <= j0 + jj) & (j0 + jj < end_j), s, float("-inf"))
    return s


@triton.jit
def load_bound(BOUND, ii, inside_i, outside):
    """A bound of the keys of each query of a tile, ``outside`` for queries outside; None without bounds."""
    if BOUND is not None:
        bound = tl.load(BOUND + ii, mask=inside_i, other=outside)
    else:
        bound = None
    return bound


@triton.jit
def row_bias(
    TA, TB, ii, row, inside_i, ta_n, tb_n, ROWS, NB, AXES: tl.constexpr
):  # fmt: skip
    """Bias of the axes before the last for grid rows ``row``."""
    inside = inside_i & (row < ROWS)
    if AXES == 2:
        bias = tl.load(TA + (ii * ta_n + row), mask=inside, other=0.0).to(tl.float32)
    else:
        bias = tl.load(TA + (ii * ta_n + row // NB), mask=inside, other=0.0).to(tl.float32)
        bias += tl.load(TB + (ii * tb_n + row % NB), mask=inside, other=0.0).to(tl.float32)
    return bias


@triton.jit
def attend(
    q, acc, m, total, K, V, BIAS, MASK, first_j, end_j, axis,
    i0, ii, inside_i, j0, jj, inside_j,
    k_n, v_n, bias_n, bias_m, mask_m, scale2, causal_offset,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    CAUSAL: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take the key tile that starts at token ``j0`` into the accumulator."""
    first = tl.cast(j0, tl.int64)
    k = load_rows(K + first * k_n, jj, k_n, inside_j, D, BLOCK_D, MASKED)
    s = tile_logits(
        product(q, tl.trans(k), UPCAST, PRECISION), scale2, axis,
        BIAS + first * bias_m if BIAS is not None else None, MASK + first * mask_m if MASK is not None else None,
        first_j[:, None] if first_j is not None else None, end_j[:, None] if end_j is not None else None,
        i0, ii[:, None], j0, jj[None, :], inside_i[:, None], inside_j[None, :],
        bias_n, bias_m, mask_m, causal_offset, CAUSAL, MASKED,
    )  # fmt: skip
    p, decay, m, total = softmax_step(s, m, total)
    v = load_rows(V + first * v_n, jj, v_n, inside_j, DV, BLOCK_DV, MASKED)
    acc = accumulate(p.to(v.dtype), v, acc * decay[:, None], UPCAST, PRECISION)
    return acc, m, total


@triton.jit
def causal_end(i0, M, causal_offset, BM: tl.constexpr, CAUSAL: tl.constexpr):
    """One more than the last key that any query of the tile may see."""
    if CAUSAL:
        end = tl.maximum(0, tl.minimum(M, i0 + BM + causal_offset))
    else:
        end = M
    return end


@triton.jit
def unmasked_end(end, i0, causal_offset, BN: tl.constexpr, CAUSAL: tl.constexpr):
    """Tiles of BN keys before this one are seen whole by every query of the tile."""
    if CAUSAL:
        end = tl.minimum(end, tl.maximum(0, i0 + causal_offset + 1))
    return end // BN * BN


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    Q, K, V, BIAS, MASK, TX, TA, TB,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, bias_b, bias_h, bias_n, bias_m, mask_b, mask_m,
    tx_b, tx_h, tx_n, ta_b, ta_h, ta_n, tb_b, tb_h, tb_n,
    H, GROUP, N, M, W, ROWS, NB, scale2, causal_offset, FIRST, END, range_b,
    OUT, LSE, o_b, o_h, o_n,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BX: tl.constexpr,
    AXES: tl.constexpr, EVEN: tl.constexpr, CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head, all the keys they see."""
    if AXES > 0:
        M = W * ROWS
    tiles = tl.cdiv(N, BM)
    tile = tl.program_id(0) % tiles
    if CAUSAL:  # the longest rows first, so that no program starts late and ends late
        tile = tiles - 1 - tile
    bh = tl.program_id(0) // tiles
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    i0 = tile * BM
    first = tl.cast(i0, tl.int64)
    ii = tl.arange(0, BM)
    c = tl.arange(0, BN)
    inside_i = i0 + ii < N
    q = load_rows(Q + (b * q_b + h * q_h + first * q_n), ii, q_n, inside_i, D, BLOCK_D, True)
    K += b * k_b + h // GROUP * k_h
    V += b * v_b + h // GROUP * v_h
    if BIAS is not None:
        BIAS += b * bias_b + h * bias_h + first * bias_n
    if MASK is not None:
        MASK += b * mask_b

    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BLOCK_DV], tl.float32)
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
    if AXES == 0 and FIRST is not None:
        for j0 in range(start // BN * BN, end, BN):
            acc, m, total = attend(
                q, acc, m, total, K, V, BIAS, MASK, first_j, end_j, None, i0, ii, inside_i, j0, c, j0 + c < M,
                k_n, v_n, bias_n, bias_m, mask_m, scale2, causal_offset,
                D, DV, BLOCK_D, BLOCK_DV, CAUSAL, True, UPCAST, PRECISION,
            )  # fmt: skip
    elif AXES == 0:
        unmasked = unmasked_end(end, i0, causal_offset, BN, CAUSAL)
        for j0 in range(0, unmasked, BN):
            acc, m, total = attend(
                q, acc, m, total, K, V, BIAS, MASK, None, None, None, i0, ii, inside_i, j0, c, j0 + c < M,
                k_n, v_n, bias_n, bias_m, mask_m, scale2, causal_offset,
                D, DV, BLOCK_D, BLOCK_DV, CAUSAL, False, UPCAST, PRECISION,
            )  # fmt: skip
        if CAUSAL or not EVEN:
            for j0 in range(unmasked, end, BN):
                acc, m, total = attend(
                    q, acc, m, total, K, V, BIAS, MASK, None, None, None, i0, ii, inside_i, j0, c, j0 + c < M,
                    k_n, v_n, bias_n, bias_m, mask_m, scale2, causal_offset,
                    D, DV, BLOCK_D, BLOCK_DV, CAUSAL, True, UPCAST, PRECISION,
                )  # fmt: skip
    else:
        RB: tl.constexpr = BN // BX
        TX += b * tx_b + h * tx_h + first * tx_n
        if AXES > 1:
            TA += b * ta_b + h * ta_h + first * ta_n
        if AXES > 2:
            TB += b * tb_b + h * tb_h + first * tb_n
        down = c // BX
        jj = down * W + c % BX
        # A scalar where a tile has one grid row: its bias is then one number per query.
        row = down[None, :] if RB > 1 else tl.zeros([1, 1], tl.int32)
        for x0 in range(0, W, BX):
            x = x0 + c % BX
            tx = tl.load(TX + (ii[:, None] * tx_n + x[None, :]), mask=inside_i[:, None] & (x < W)[None, :], other=0.0)
            for r0 in range(start // W // RB * RB, tl.cdiv(end, W), RB):
                axis = tx.to(tl.float32)
                if AXES > 1:
                    axis += row_bias(TA, TB, ii[:, None], r0 + row, inside_i[:, None], ta_n, tb_n, ROWS, NB, AXES)
                acc, m, total = attend(
                    q, acc, m, total, K, V, BIAS, MASK, first_j, end_j, axis,
                    i0, ii, inside_i, r0 * W + x0, jj, (x < W) & (r0 + down < ROWS),
                    k_n, v_n, bias_n, bias_m, mask_m, scale2, causal_offset,
                    D, DV, BLOCK_D, BLOCK_DV, CAUSAL, CAUSAL or not EVEN, UPCAST, PRECISION,
                )  # fmt: skip

    out, lse = finish(acc, m, total)
    store_rows(OUT + (b * o_b + h * o_h + first * o_n), ii, o_n, inside_i, out, DV, BLOCK_DV)
    tl.store(LSE + ((b * H + h) * N + i0 + ii), lse, mask=inside_i)
