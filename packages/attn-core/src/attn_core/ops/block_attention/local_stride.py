"""Builder of the block-sparse table of S2 attention: a local band and strided columns that differ between heads."""

import torch
from jaxtyping import Int
from torch import Tensor

from attn_core.checks import check_flag, check_integer, fail

BUILDER = "local_stride_table"


def local_stride_table(
    blocks: int,
    local: int,
    stride: int,
    num_heads: int,
    *,
    num_kv_heads: int | None = None,
    num_dense_heads: int = 0,
    step: int | None = None,
    offset: int = 0,
    causal: bool = True,
    device: torch.device | str | None = None,
) -> Int[Tensor, "1 H R K"]:
    """Key blocks that each query block reads: the ``local`` nearest, and every ``stride``-th of the others.

    Causal: block r of key head h reads r − local + 1 … r, and all c ≤ r with (c + h·step + offset) mod stride = 0, so
    the heads together cover what one head leaves out. Bidirectional: all c closer than ``local``, and beyond the band
    those whose distance from its border is a multiple of ``stride``, alike for all heads.

    Args:
        blocks: number of blocks of queries and of keys, R.
        local: blocks of the band, the own block included; at least 1.
        stride: distance of the strided blocks, at least 1.
        num_heads: query heads. The heads of one key head share its pattern.
        num_kv_heads: key heads, ``num_heads`` by default.
        num_dense_heads: this many last key heads read everything.
        step: shift of the pattern from key head to key head; max(1, ⌊stride / num_heads⌋) by default.

    Returns:
        int32 (1, H, R, K), ascending, −1 where a block reads fewer than K; the ``table`` of
        :func:`attn_core.block_attention`, to be called with ``causal=True`` for the order inside blocks.

    Raises:
        ValueError: a number is out of range, or num_heads is not a multiple of num_kv_heads.

    Source: Lin et al. 2024 (arXiv 2407.17678), linxihui/dkernel, ``get_sparse_attn_mask``.
    """
    kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    for argument, value, least in (
        ("blocks", blocks, 0),
        ("local", local, 1),
        ("stride", stride, 1),
        ("num_heads", num_heads, 1),
        ("num_kv_heads", kv_heads, 1),
        ("num_dense_heads", num_dense_heads, 0),
    ):
        check_integer(BUILDER, argument, value, least)
    if step is not None:
        check_integer(BUILDER, "step", step)
    check_integer(BUILDER, "offset", offset)
    check_flag(BUILDER, "causal", causal)
    if num_heads % kv_heads:
        raise ValueError(f"{BUILDER}: num_heads must be a multiple of num_kv_heads, got {num_heads} and {kv_heads}")
    if num_dense_heads > kv_heads:
        fail(BUILDER, "num_dense_heads", f"must not exceed the {kv_heads} key heads", num_dense_heads)
    step = max(1, stride // num_heads) if step is None else step
    row = torch.arange(blocks)[:, None]
    column = torch.arange(blocks)
    head = torch.arange(kv_heads)[:, None, None]
    if causal:
        strided = (column + head * step + offset) % stride == 0
        seen = (strided | (row - column < local)) & (column <= row)
        everything = column <= row
    else:
        beyond = ((row - column).abs() - local + 1).clamp(min=0)
        seen = (beyond % stride == 0).expand(kv_heads, blocks, blocks)
        everything = torch.ones(blocks, blocks, dtype=torch.bool)
    seen = torch.where(head >= kv_heads - num_dense_heads, everything, seen)
    most = int(seen.sum(-1).max()) if blocks else 0
    listed = torch.where(seen, column, blocks).sort(-1).values[..., :most]
    table = listed.masked_fill(listed == blocks, -1).to(torch.int32)
    return table.repeat_interleave(num_heads // kv_heads, dim=0)[None].to(device)
