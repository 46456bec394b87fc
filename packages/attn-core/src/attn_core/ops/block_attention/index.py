"""Builders of the block lists and tables of :func:`attn_core.block_attention`."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from attn_core.checks import check_integer, check_number, check_rank, check_sizes, fail


def window_index(
    height: int, width: int, window: tuple[int, int], *, device: torch.device | str | None = None
) -> Int[Tensor, "1 1 R I"]:
    """Tokens of the non-overlapping windows of a row-major map; a window that leaves the map has holes (−1).

    Args:
        height, width: size of the map in tokens.
        window: size of a window in tokens (rows, columns).

    Returns:
        int32 (1, 1, ⌈height/rows⌉·⌈width/columns⌉, rows·columns), windows and their tokens row-major.
    """
    _check_map("window_index", height, width, window, "window")
    return halo_index(height, width, window, (0, 0), device=device)


def halo_index(
    height: int, width: int, block: tuple[int, int], halo: tuple[int, int], *, device: torch.device | str | None = None
) -> Int[Tensor, "1 1 R J"]:
    """Tokens of each block and of a border of ``halo`` tokens around it; −1 outside the map.

    Returns:
        int32 (1, 1, R, (rows + 2·halo_rows)·(columns + 2·halo_columns)), ordered as :func:`window_index`.
    """
    _check_map("halo_index", height, width, block, "block")
    check_sizes("halo_index", "halo", halo, "(rows, columns)", 0)
    rows = _axis_windows(height, block[0], halo[0], device)  # (block row, row in window)
    columns = _axis_windows(width, block[1], halo[1], device)
    tokens = rows[:, None, :, None] * width + columns[None, :, None, :]
    outside = (rows[:, None, :, None] < 0) | (columns[None, :, None, :] < 0)
    return tokens.masked_fill(outside, -1).flatten(2).flatten(0, 1)[None, None]


def _check_map(builder: str, height: int, width: int, block: tuple[int, int], argument: str) -> None:
    check_integer(builder, "height", height, 0)
    check_integer(builder, "width", width, 0)
    check_sizes(builder, argument, block, "(rows, columns)", 1)


def _axis_windows(length: int, block: int, halo: int, device: torch.device | str | None) -> Tensor:
    """Coordinates along one axis: (⌈length/block⌉, block + 2·halo), −1 outside 0…length−1."""
    start = torch.arange(0, length, block, dtype=torch.int32, device=device)
    offset = torch.arange(-halo, block + halo, dtype=torch.int32, device=device)
    coordinates = start[:, None] + offset
    return coordinates.masked_fill((coordinates < 0) | (coordinates >= length), -1)


def topk_route(
    q_regions: Float[Tensor, "B R C"], k_regions: Float[Tensor, "B S C"], topk: int, *, scale: float = 1.0
) -> tuple[Int[Tensor, "B 1 R K"], Float[Tensor, "B 1 R K"]]:
    """For each query region the ``topk`` key regions of highest affinity scale·q_r·k_s (BiFormer eq. 3–4).

    Gradients reach the weights, never the choice; BiFormer detaches both descriptors. Ties are broken by torch.topk,
    differently on CPU and GPU.

    Returns:
        table int64 (B, 1, R, topk), best first, and the softmax over the chosen affinities.
    """
    check_rank("topk_route", "q_regions", q_regions, "B R C")
    check_rank("topk_route", "k_regions", k_regions, "B S C")
    check_number("topk_route", "scale", scale)
    check_integer("topk_route", "topk", topk)
    if not 0 < topk <= k_regions.shape[1]:
        fail("topk_route", "topk", f"must lie in 1…{k_regions.shape[1]}, the number of key regions", topk)
    affinity, table = torch.topk((q_regions * scale) @ k_regions.transpose(-2, -1), topk, dim=-1)
    return table.unsqueeze(1), affinity.softmax(-1).unsqueeze(1)
