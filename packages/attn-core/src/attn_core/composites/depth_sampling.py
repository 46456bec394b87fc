"""Deformable attention on depth-lifted maps in two stages (DFA3D): scores of the cells, then a sum weighted by them.

:func:`attn_core.deformable_attention` with ``depth`` does both in one; these two are what official code calls. Plain
torch, differentiable: tables are read by ``embedding_bag``, one map of one image at a time.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from attn_core.checks import check_integer, check_rank, check_size, described, fail

CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))


def depth_scores(
    depth: Float[Tensor, "B S H Z"],
    spatial_shapes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "B N H L P 3"],
) -> Float[Tensor, "B N H L P 4"]:
    """Depth distribution of the four cells around (x, y), read linearly at d; zero outside the map and the bins.

    Corners are (y0 x0), (y0 x1), (y1 x0), (y1 x1). Differentiable in ``depth`` and in d; x and y choose cells alone.

    Args:
        locations: (x, y, d) in [0, 1], edges of the outer cells; the dtype of ``depth``.

    Raises:
        ValueError: shapes do not fit, or the maps have not the cells of ``depth``.

    Source: Li et al. 2023 (arXiv 2307.12972); https://github.com/IDEA-Research/3D-deformable-attention.
    """
    name = "depth_scores"
    check_rank(name, "depth", depth, "B S H Z")
    _check_maps(name, depth, spatial_shapes)
    _check_locations(name, depth, spatial_shapes, locations, 3)
    bins = depth.shape[-1]
    levels = []
    for level, (cells, h, w) in enumerate(_maps(spatial_shapes)):
        at = locations[:, :, :, level]
        position = at[..., 2] * bins - 0.5
        row, column = _before(at[..., 1] * h - 0.5, h), _before(at[..., 0] * w - 0.5, w)
        corners = []
        for dy, dx in CORNERS:
            cell, inside = _cell(row, column, dy, dx, h, w)
            score = torch.zeros_like(position)
            for side in (0, 1):
                weight, index = _tap(position, side, bins)
                picked = _pick(depth[:, cells], cell, index)
                score = score + weight * picked
            corners.append(score * inside)
        levels.append(torch.stack(corners, -1))
    return torch.stack(levels, 3)


def scored_deformable_attention(
    value: Float[Tensor, "B S H D"],
    spatial_shapes: Sequence[tuple[int, int]],
    locations: Float[Tensor, "B N H L P 2"],
    weights: Float[Tensor, "B N H L P"],
    scores: Float[Tensor, "B N H L P 4"],
) -> Float[Tensor, "B N HD"]:
    """Σ weights · Σ over the four cells of bilinear weight · score · value; differentiable in all but the maps' sizes.

    Memory: the weights and indices of the corners, 4·N·H·L·P numbers.

    Raises:
        ValueError: shapes do not fit, or the maps have not the cells of ``value``.

    Source: as :func:`depth_scores`.
    """
    name = "scored_deformable_attention"
    check_rank(name, "value", value, "B S H D")
    _check_maps(name, value, spatial_shapes)
    _check_locations(name, value, spatial_shapes, locations, 2)
    check_rank(name, "weights", weights, "B N H L P")
    check_rank(name, "scores", scores, "B N H L P 4")
    for argument, tensor in (("weights", weights), ("scores", scores)):
        for dim, size in enumerate(locations.shape[:5]):
            check_size(name, argument, tensor, dim, size, "that of locations")
    batch, _, heads, width = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    head = torch.arange(heads, device=value.device).view(1, heads, 1)
    out = [value.new_zeros(queries * heads, width) for _ in range(batch)]
    for level, (cells, h, w) in enumerate(_maps(spatial_shapes)):
        x, y = locations[:, :, :, level, :, 0] * w - 0.5, locations[:, :, :, level, :, 1] * h - 0.5
        row, column = _before(y, h), _before(x, w)
        index, factor = [], []
        for corner, (dy, dx) in enumerate(CORNERS):
            cell, inside = _cell(row, column, dy, dx, h, w)
            bilinear = _side(y, row, dy) * _side(x, column, dx) * inside
            index.append(cell * heads + head)
            factor.append(bilinear * weights[:, :, :, level] * scores[:, :, :, level, :, corner])
        places = torch.stack(index, -1).view(batch, queries * heads, 4 * points)
        shares = torch.stack(factor, -1).view(batch, queries * heads, 4 * points).to(value.dtype)
        for image in range(batch):
            table = value[image, cells].reshape(-1, width)
            out[image] = out[image] + F.embedding_bag(
                places[image], table, mode="sum", per_sample_weights=shares[image]
            )
    return torch.stack(out).view(batch, queries, heads * width)


def _maps(shapes: Sequence[tuple[int, int]]) -> Iterator[tuple[slice, int, int]]:
    start = 0
    for h, w in shapes:
        yield slice(start, start + h * w), h, w
        start += h * w


def _check_maps(name: str, maps: Tensor, shapes: Any) -> None:
    try:
        sizes = [size for h, w in shapes for size in (h, w)]
    except (TypeError, ValueError):
        raise TypeError(
            f"{name}: spatial_shapes must list the (h, w) of each map, got spatial_shapes={described(shapes)}"
        ) from None
    for size in sizes:
        check_integer(name, "spatial_shapes", size, 1)
    if sum(h * w for h, w in shapes) != maps.shape[1]:
        fail(name, "spatial_shapes", f"must have the {maps.shape[1]} cells of the maps", shapes)


def _check_locations(name: str, maps: Tensor, shapes: Sequence[Any], locations: Tensor, coordinates: int) -> None:
    check_rank(name, "locations", locations, f"B N H L P {coordinates}")
    for dim, size, reason in ((0, maps.shape[0], "the batch"), (2, maps.shape[2], "the heads")):
        check_size(name, "locations", locations, dim, size, reason)
    check_size(name, "locations", locations, 3, len(shapes), "the maps of spatial_shapes")
    check_size(name, "locations", locations, 5, coordinates, "the coordinates")


def _before(position: Tensor, size: int) -> Tensor:
    """Index of the cell before a position; −2 where no cell is near (NaN too)."""
    near = (position > -1) & (position < size)
    return torch.where(near, position.detach(), -2.0).floor().long()


def _cell(row: Tensor, column: Tensor, dy: int, dx: int, h: int, w: int) -> tuple[Tensor, Tensor]:
    """Cell of a corner, and whether it lies on the map and near the position."""
    y, x = row + dy, column + dx
    inside = (row > -2) & (column > -2) & (y >= 0) & (y < h) & (x >= 0) & (x < w)
    return torch.where(inside, y * w + x, 0), inside


def _side(position: Tensor, before: Tensor, side: int) -> Tensor:
    """Linear weight of the cell before (0) or after (1) a position."""
    fraction = torch.where(before > -2, position - before, 0.0)
    return fraction if side else 1 - fraction


def _tap(position: Tensor, side: int, size: int) -> tuple[Tensor, Tensor]:
    """Weight and index of the bin before or after a position; bins outside weigh 0."""
    before = _before(position, size)
    index = before + side
    inside = (before > -2) & (index >= 0) & (index < size)
    return _side(position, before, side) * inside, torch.where(inside, index, 0)


def _pick(depth: Tensor, cell: Tensor, index: Tensor) -> Tensor:
    """depth (B, h·w, H, Z) at cell and bin (B, N, H, P)."""
    batch, _, heads, bins = depth.shape
    flat = depth.transpose(1, 2).reshape(batch, heads, -1)
    places = (cell * bins + index).transpose(1, 2)  # (B, H, N, P)
    return flat.gather(2, places.flatten(2)).view(places.shape).transpose(1, 2)
