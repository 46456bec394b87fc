# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# Kernels are Triton, not Python: constants stand where constexpr is declared, constant conditions decide what is bound.
"""Backward kernels of grouped attention; lists and argument names as in :mod:`.triton_forward`.

Inside a group p = exp(s − L) and c = dO Vᵀ: dS = p∘(W c + E), where W is the group's weight and E holds all that does
not depend on the key. MASS, WEIGHT and EXTRA (B, H, G, N) are L, W and E, contiguous. Three passes: shares
(dO_i·o_ig, which E and the gradient of a weight or gate need), queries (dQ), and tiles of keys (dK and dV, over all
heads that share the keys). Each owns what it writes, so two runs give equal bits.
"""

import triton
import triton.language as tl

from attn_core.kernels.tiles import accumulate, load_lse, load_rows, product, store_rows

from .triton_forward import group_logits, last_tile


@triton.jit(do_not_specialize=["G", "causal_offset"])
def query_kernel(
    Q, K, V, TOKEN, FIRST, BIAS,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, token_b, first_b, bias_b, bias_h, bias_n, bias_m,
    H, GROUP, N, G, scale2, causal_offset,
    DO, MASS, WEIGHT, EXTRA, do_b, do_h, do_n, scale,
    SHARE, DQ, dq_b, dq_h, dq_n,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head. With SHARE (B, H, G, N) it stores dO_i·o_ig, otherwise dQ."""
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
    q = load_rows(Q + (b * q_b + h * q_h + first * q_n), ii, q_n, inside_i, D, BLOCK_D, True)
    do = load_rows(DO + (b * do_b + h * do_h + first * do_n), ii, do_n, inside_i, DV, BLOCK_DV, True)
    K += b * k_b + h // GROUP * k_h
    V += b * v_b + h // GROUP * v_h
    TOKEN += b * token_b
    FIRST += b * first_b
    if BIAS is not None:
        BIAS += b * bias_b + h * bias_h + first * bias_n

    WANT_Q: tl.constexpr = SHARE is None
    # A loop cannot carry None.
    dq = tl.zeros([BM, BLOCK_D] if WANT_Q else [1, 1], tl.float32)
    for g in range(G):
        row = ((b * H + h) * G + g) * N + first
        mass = load_lse(MASS + row + ii, inside_i)
        start = tl.load(FIRST + g)
        end = last_tile(TOKEN, start, tl.load(FIRST + g + 1), i0, causal_offset, BM, BN, CAUSAL)
        if WANT_Q:
            weight = tl.load(WEIGHT + row + ii, mask=inside_i, other=0.0)
            extra = tl.load(EXTRA + row + ii, mask=inside_i, other=0.0)
        share = tl.zeros([BM], tl.float32)
        for t in range(start, end):
            token = tl.load(TOKEN + t * BN + c).to(tl.int64)
            inside_j = token >= 0
            k = load_rows(K, token, k_n, inside_j, D, BLOCK_D, True)
            s = group_logits(
                product(q, tl.trans(k), UPCAST, PRECISION), scale2, BIAS,
                i0, ii[:, None], token[None, :], inside_i[:, None], inside_j[None, :],
                bias_n, bias_m, causal_offset, CAUSAL,
            )  # fmt: skip
            p = tl.exp2(s - mass[:, None])
            v = load_rows(V, token, v_n, inside_j, DV, BLOCK_DV, True)
            dp = product(do, tl.trans(v), UPCAST, PRECISION)
            if WANT_Q:
                ds = p * (weight[:, None] * dp + extra[:, None])
                dq = accumulate(ds.to(k.dtype), k, dq, UPCAST, PRECISION)
            else:
                share += tl.sum(p * dp, 1)
        if not WANT_Q:
            tl.store(SHARE + row + ii, share, mask=inside_i)
    if WANT_Q:
        store_rows(DQ + (b * dq_b + h * dq_h + first * dq_n), ii, dq_n, inside_i, dq * scale, D, BLOCK_D)


@triton.jit(do_not_specialize=["G", "causal_offset", "tiles"])
def key_kernel(
    Q, K, V, TOKEN, TILE_GROUP, BIAS,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, token_b, tile_b, bias_b, bias_h, bias_n, bias_m,
    H, GROUP, N, G, scale2, causal_offset,
    DO, MASS, WEIGHT, EXTRA, do_b, do_h, do_n, scale, tiles,
    DK, DVAL, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
    UPCAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dK, dV or both of one tile of one key head, over the queries of every head of its group of heads.

    TILE_GROUP (b, tiles) names the group of each tile, G for tiles that no group needs. Scores are held transposed.
    """
    tile = tl.program_id(0) % tiles
    heads = H // GROUP
    bh = tl.program_id(0) // tiles
    b = (bh // heads).to(tl.int64)
    hk = (bh % heads).to(tl.int64)
    ii = tl.arange(0, BM)
    c = tl.arange(0, BN)
    g = tl.load(TILE_GROUP + b * tile_b + tile).to(tl.int64)
    TOKEN += b * token_b + tile * BN
    token = tl.load(TOKEN + c).to(tl.int64)
    inside_j = token >= 0
    k = load_rows(K + (b * k_b + hk * k_h), token, k_n, inside_j, D, BLOCK_D, True)
    v = load_rows(V + (b * v_b + hk * v_h), token, v_n, inside_j, DV, BLOCK_DV, True)

    WANT_K: tl.constexpr = DK is not None
    WANT_V: tl.constexpr = DVAL is not None
    dk = tl.zeros([BN, BLOCK_D] if WANT_K else [1, 1], tl.float32)
    dv = tl.zeros([BN, BLOCK_DV] if WANT_V else [1, 1], tl.float32)
    start = tl.maximum(0, tl.load(TOKEN) - causal_offset) // BM * BM if CAUSAL else 0
    end = tl.where(g < G, N, 0)
    for e in range(GROUP):
        h = hk * GROUP + e
        row = ((b * H + h) * G + g) * N
        Qh = Q + (b * q_b + h * q_h)
        DOh = DO + (b * do_b + h * do_h)
        BIASh = BIAS + (b * bias_b + h * bias_h) if BIAS is not None else None
        for i0 in range(start, end, BM):
            first = tl.cast(i0, tl.int64)
            inside_i = i0 + ii < N
            q = load_rows(Qh + first * q_n, ii, q_n, inside_i, D, BLOCK_D, True)
            mass = load_lse(MASS + row + first + ii, inside_i)
            weight = tl.load(WEIGHT + row + first + ii, mask=inside_i, other=0.0)
            s = group_logits(
                product(k, tl.trans(q), UPCAST, PRECISION), scale2,
                BIASh + first * bias_n if BIAS is not None else None,
                i0, ii[None, :], token[:, None], inside_i[None, :], inside_j[:, None],
                bias_n, bias_m, causal_offset, CAUSAL,
            )  # fmt: skip
            p = tl.exp2(s - mass[None, :])
            do = load_rows(DOh + first * do_n, ii, do_n, inside_i, DV, BLOCK_DV, True)
            if WANT_V:
                dv = accumulate((p * weight[None, :]).to(do.dtype), do, dv, UPCAST, PRECISION)
            if WANT_K:
                extra = tl.load(EXTRA + row + first + ii, mask=inside_i, other=0.0)
                ds = p * (weight[None, :] * product(v, tl.trans(do), UPCAST, PRECISION) + extra[None, :])
                dk = accumulate(ds.to(q.dtype), q, dk, UPCAST, PRECISION)
    if WANT_K:
        store_rows(DK + (b * dk_b + hk * dk_h), token, dk_n, inside_j, dk * scale, D, BLOCK_D)
    if WANT_V:
        store_rows(DVAL + (b * dv_b + hk * dv_h), token, dv_n, inside_j, dv, DV, BLOCK_DV)


@triton.jit(do_not_specialize=["H", "N", "G"])
def shares_kernel(
    LSE, FACTOR, OUT, DO, SHARE, GRAD_LSE, MASS, WEIGHT, EXTRA, DGATE,
    factor_b, factor_h, factor_n, factor_g, o_b, o_h, o_n, do_b, do_h, do_n, dl_b, dl_h, dl_n, dl_g,
    H, N, G,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr, BLOCK_G: tl.constexpr, WEIGHT_MODE: tl.constexpr,
):  # fmt: skip
    """One program: BM queries of one head and all groups.

    W are the weights themselves, or a softmax of masses or gates; E = −W·share + dL, with dO·out in place of the shares
    where there are none. LSE and the gates' gradient DGATE (B, H, N, G) are contiguous.
    """
    tiles = tl.cdiv(N, BM)
    bh = tl.program_id(0) // tiles
    b = (bh // H).to(tl.int64)
    h = (bh % H).to(tl.int64)
    i0 = tl.program_id(0) % tiles * BM
    first = tl.cast(i0, tl.int64)
    ii = tl.arange(0, BM)
    g = tl.arange(0, BLOCK_G)
    inside_i = i0 + ii < N
    inside = inside_i[:, None] & (g < G)[None, :]
    own = ((b * H + h) * N + first) * G + ii[:, None] * G + g[None, :]
    turned = (b * H + h) * G * N + g[None, :].to(tl.int64) * N + first + ii[:, None]
    mass = tl.load(LSE + own, mask=inside, other=float("-inf"))
    dead = mass == float("-inf")
    logits = mass
    if FACTOR is not None:
        places = b * factor_b + h * factor_h + (first + ii[:, None]) * factor_n + g[None, :] * factor_g
        logits = tl.load(FACTOR + places, mask=inside, other=0.0).to(tl.float32)
    if WEIGHT_MODE:
        weight = tl.where(dead, 0.0, logits)
    else:
        logits = tl.where(dead, float("-inf"), logits)
        most = tl.max(logits, 1)
        weight = tl.exp(logits - tl.where(most == float("-inf"), 0.0, most)[:, None])
        total = tl.sum(weight, 1)
        weight = weight / tl.where(total == 0.0, 1.0, total)[:, None]
    if SHARE is None:
        do = load_rows(DO + (b * do_b + h * do_h + first * do_n), ii, do_n, inside_i, DV, BLOCK_DV, True)
        out = load_rows(OUT + (b * o_b + h * o_h + first * o_n), ii, o_n, inside_i, DV, BLOCK_DV, True)
        share = tl.sum(do.to(tl.float32) * out.to(tl.float32), 1)[:, None]
    else:
        share = tl.load(SHARE + turned, mask=inside, other=0.0)
    if DGATE is not None:
        mean = tl.sum(weight * share, 1)[:, None]
        tl.store(DGATE + own, weight * (share - mean), mask=inside)
    extra = -weight * share
    if GRAD_LSE is not None:
        places = b * dl_b + h * dl_h + (first + ii[:, None]) * dl_n + g[None, :] * dl_g
        extra += tl.load(GRAD_LSE + places, mask=inside, other=0.0)
    tl.store(MASS + turned, mass, mask=inside)
    tl.store(WEIGHT + turned, weight, mask=inside)
    tl.store(EXTRA + turned, extra, mask=inside)
