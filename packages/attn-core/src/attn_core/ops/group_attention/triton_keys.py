# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# Kernels are Triton, not Python: constants stand where constexpr is declared, constant conditions decide what is bound.
"""Kernels that make the token list of grouped attention, around one stable sort of the keys by group."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["M", "G"])
def name_kernel(GROUP, MASK, NAMED, group_b, group_m, mask_b, mask_m, M, G, BM: tl.constexpr):
    """NAMED (b, M) int32: the group of each key that is not hidden, or G."""
    tiles = tl.cdiv(M, BM)
    b = (tl.program_id(0) // tiles).to(tl.int64)
    j = tl.program_id(0) % tiles * BM + tl.arange(0, BM)
    inside = j < M
    group = tl.load(GROUP + b * group_b + j.to(tl.int64) * group_m, mask=inside, other=0)
    hidden = tl.load(MASK + b * mask_b + j.to(tl.int64) * mask_m, mask=inside, other=0) == 0
    tl.store(NAMED + b * M + j, tl.where(hidden, G, group).to(tl.int32), mask=inside)


@triton.jit(do_not_specialize=["M", "G", "tiles"])
def tile_kernel(ORDER, STARTS, TOKEN, FIRST, TILE_GROUP, M, G, tiles, BN: tl.constexpr, BLOCK_G: tl.constexpr):
    """One tile of the list: its group, its tokens in order, −1 in holes; the first one also writes FIRST."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles
    g = tl.arange(0, BLOCK_G)
    start = tl.load(STARTS + b * (G + 1) + g, mask=g <= G, other=0)
    end = tl.load(STARTS + b * (G + 1) + g + 1, mask=g < G, other=0)
    needed = tl.where(g < G, (end - start + BN - 1) // BN, 0)
    behind = tl.cumsum(needed, 0)
    own = tl.sum(((behind <= t) & (g < G)).to(tl.int32), 0)  # G behind the last
    mine = (g == own) & (g < G)
    first = tl.sum(tl.where(mine, behind - needed, 0), 0)
    place = tl.sum(tl.where(mine, start, 0), 0) + (t - first) * BN + tl.arange(0, BN)
    held = place < tl.sum(tl.where(mine, end, 0), 0)
    token = tl.load(ORDER + b * M + place, mask=held, other=-1)
    tl.store(TOKEN + (b * tiles + t) * BN + tl.arange(0, BN), token.to(tl.int32))
    tl.store(TILE_GROUP + b * tiles + t, own)
    if t == 0:
        tl.store(FIRST + b * (G + 1) + g, behind - needed, mask=g <= G)
