"""Deformable attention in plain torch: samples as weighted sums of table rows (``embedding_bag``), never in memory.

Memory beyond the result: one chunk of corners, and one map of one image in float32 for 16-bit values.
"""

import functools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_core.kernels.registration import Grads

from .reference import DEFORMABLE_ATTENTION, Arguments, reference

# Corners in flight: indices, weights and their gradients of 2²⁰ corners are about 40 MiB.
CHUNK_CORNERS = 2**20
# Numbers of all samples up to which they are taken by torch's grid_sample, in memory.
SMALL = 2**14


def forward(a: Arguments) -> Tensor:
    """Rows gathered and weighed for some queries at a time."""
    batch, _, heads, width = a.value.shape
    if a.depth is None and 0 < a.weights.numel() * width <= SMALL and len(a.weights) == len(a.locations) == batch:
        return _sampled(a)
    out = a.locations.new_zeros(batch, a.locations.shape[1], heads, width)
    if out.numel() and a.weights.numel():
        for part in _parts(a):
            sums = _weighted_rows(part.table, part.corners.index, part.corners.scaled(part.weights))
            target = out[part.image, part.queries]
            target += sums.view_as(target)
    return out.flatten(2).to(a.value.dtype)


def _sampled(a: Arguments) -> Tensor:
    value, locations, weights, _, _ = a
    dtype = locations.dtype
    if value.dtype != dtype:
        value, weights = value.to(dtype), weights.to(dtype)
    batch, cells, heads, width = value.shape
    queries, levels, points = weights.shape[1], weights.shape[3], weights.shape[4]
    # The edges of a map are −1 and 1 there; what lies far outside, NaN among it, must not reach a conversion to int.
    places = torch.add(_minus_one(dtype), locations, alpha=2.0).nan_to_num_(-9.0).clamp_(-9.0, 9.0)
    places = places.permute(0, 2, 3, 1, 4, 5).reshape(batch * heads, levels, queries, points, 2)
    shares = weights.permute(0, 2, 3, 1, 4).reshape(batch * heads, 1, levels, queries, points)
    maps = value.permute(0, 2, 3, 1).reshape(batch * heads, width, cells)
    if levels == 1:
        samples = torch.grid_sampler_2d(maps.view(*maps.shape[:2], *a.shapes), places.squeeze(1), 0, 0, False)
        out = samples.mul_(shares.squeeze(2)).sum(-1)
    else:
        samples = maps.new_empty(batch * heads, width, levels, queries, points)
        start = 0
        for level, (rows, columns) in enumerate(a.maps()):
            own = maps[:, :, start : start + rows * columns].view(*maps.shape[:2], rows, columns)
            start += rows * columns
            samples[:, :, level] = torch.grid_sampler_2d(own, places[:, level], 0, 0, False)
        out = samples.mul_(shares).sum((2, 4))
    out = out.view(batch, heads * width, queries).mT.contiguous()
    return out if out.dtype == a.value.dtype else out.to(a.value.dtype)


@functools.cache
def _minus_one(dtype: torch.dtype) -> Tensor:
    return torch.tensor(-1.0, dtype=dtype, device="cpu")


def backward(grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:  # noqa: ARG001  the backends' signature
    """Rows gathered again; d_value is scattered to the four cells that each point reads."""
    (grad_out,), (value, locations, weights, depth, _) = grads, a
    assert grad_out is not None
    dtype = locations.dtype
    like = {"dtype": dtype, "device": value.device}
    d_value, d_locations = torch.zeros(value.shape, **like), torch.zeros(locations.shape, **like)
    d_weights = torch.zeros(weights.shape, **like)
    d_depth = None if depth is None else torch.zeros(depth.shape, **like)
    if grad_out.numel() and weights.numel():
        grad_out = grad_out.unflatten(2, value.shape[2:]).to(dtype)
        for part in _parts(a):
            corners, at = part.corners, (part.image, part.queries)
            rows = grad_out[at].flatten(0, 1).contiguous()
            if needs[0]:
                target = d_value[part.image, part.cells]
                target += _scattered_rows(rows, corners.index, corners.scaled(part.weights), target)
            if not any(needs[1:]):
                continue
            dots = _dots(part.table, corners.index, rows).view_as(corners.bilinear)
            read = dots if corners.read is None else dots * corners.read
            d_weights[at][:, :, part.level] = (read * corners.bilinear).sum((0, 1))
            along = d_locations[at][:, :, part.level]
            along[..., 0] = part.weights * part.width * (read * corners.slope_x).sum((0, 1))
            along[..., 1] = part.weights * part.height * (read * corners.slope_y).sum((0, 1))
            if d_depth is not None and corners.taps is not None:
                cell = part.weights * corners.bilinear * dots
                bins = corners.taps
                along[..., 2] = (cell * bins.slope).sum((0, 1, 2))
                # A view: the cells of one map of one image are one block.
                flat = d_depth[part.image, part.cells].view(-1)
                flat.index_add_(0, bins.index.flatten(), (cell * bins.weight).flatten())
    return [d_value, d_locations, d_weights, d_depth]


@dataclass(frozen=True)
class _Taps:
    """The two depth bins of each corner, (2, 2, 2, n, H, P): bins come first."""

    index: Tensor  # into the flat depth of the map
    weight: Tensor
    slope: Tensor  # what the two bins add to the derivative by d


@dataclass(frozen=True)
class _Corners:
    """The four cells of each sample, (2, 2, n, H, P): rows, columns, samples.

    Corners come first because broadcasting over a last dimension of two runs at a tenth of the speed.
    """

    index: Tensor  # row of the table (cell, head)
    bilinear: Tensor
    slope_x: Tensor  # derivative of the bilinear weight by the column
    slope_y: Tensor
    read: Tensor | None  # depth of the cell, read at d
    taps: _Taps | None

    def scaled(self, weights: Tensor) -> Tensor:
        total = self.bilinear * weights
        return total if self.read is None else total * self.read


@dataclass(frozen=True)
class _Part:
    """Some queries of one image, on one map."""

    image: int
    level: int
    queries: slice
    cells: slice
    height: int
    width: int
    table: Tensor  # (h·w·H, D) in the accumulation dtype
    weights: Tensor  # (n, H, P) in the accumulation dtype
    corners: _Corners


def _parts(a: Arguments) -> Iterator[_Part]:
    value, locations, weights, depth, _ = a
    batch, _, heads, _ = value.shape
    queries, points = locations.shape[1], locations.shape[4]
    # Under vmap an argument may have one batch entry for all.
    locations, weights = locations.expand(batch, *locations.shape[1:]), weights.expand(batch, *weights.shape[1:])
    depth = None if depth is None else depth.expand(batch, *depth.shape[1:])
    dtype = locations.dtype
    step = max(1, CHUNK_CORNERS // max(1, heads * points * (4 if depth is None else 8)))
    for image in range(batch):
        start = 0
        for level, (height, width) in enumerate(a.maps()):
            cells = slice(start, start + height * width)
            start = cells.stop
            table = value[image, cells].to(dtype).reshape(-1, value.shape[3])
            bins = None if depth is None else depth[image, cells].to(dtype).flatten(0, 1)
            for first in range(0, queries, step):
                rows = slice(first, min(first + step, queries))
                corners = _corners(locations[image, rows, :, level], height, width, bins)
                share = weights[image, rows, :, level].to(dtype)
                yield _Part(image, level, rows, cells, height, width, table, share, corners)


def _corners(locations: Tensor, height: int, width: int, bins: Tensor | None) -> _Corners:
    heads, points = locations.shape[1:3]
    row, y, slope_y = (t.unsqueeze(1) for t in _linear(locations[..., 1] * height - 0.5, height))
    column, x, slope_x = _linear(locations[..., 0] * width - 0.5, width)
    head = torch.arange(heads, dtype=torch.int32, device=locations.device).repeat_interleave(points)
    index = row * (width * heads) + (column * heads + head.view(heads, points))
    read = taps = None
    if bins is not None:
        size = bins.shape[1]
        tap, z, slope_z = (t[:, None, None] for t in _linear(locations[..., 2] * size - 0.5, size))
        at = index.long() * size + tap
        depth = bins.reshape(-1)[at]
        taps, read = _Taps(at, z, slope_z * size * depth), (z * depth).sum(0)
    return _Corners(index, y * x, y * slope_x, slope_y * x, read, taps)


def _linear(position: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Indices, weights and derivatives (2, …) of the cells before and after a position; outside cells weigh 0."""
    # Far positions, NaN among them, have no neighbor: they must not reach the conversion to int.
    near = (position > -1) & (position < size)
    position = torch.where(near, position, 0.0)
    before = position.floor()
    fraction = position - before
    index = torch.stack([before, before + 1]).int()
    inside = near & (index >= 0) & (index < size)
    weight = torch.stack([1 - fraction, fraction])
    slope = torch.tensor([-1.0, 1.0], dtype=position.dtype, device=position.device)
    return index.clamp_(0, size - 1), weight * inside, slope.view(-1, *[1] * position.ndim) * inside


def _weighted_rows(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Σ over corners and points of weighted table rows: index and weight (2, 2, n, H, P) → (n·H, D)."""
    points = index.shape[-1]
    starts = torch.arange(0, index.numel(), points, dtype=index.dtype, device=index.device)
    bags = torch.embedding_bag(table, index.flatten(), starts, False, 0, False, weight.flatten())[0]
    return bags.view(4, -1, table.shape[1]).sum(0)


def _scattered_rows(rows: Tensor, index: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """The transpose of :func:`_weighted_rows`: corners sorted by the table row they read, then summed row by row."""
    flat = index.flatten()
    order = flat.sort(stable=True).indices
    counts = torch.bincount(flat, minlength=target.shape[0] * target.shape[1])
    starts = counts.cumsum(0) - counts
    source = (order // index.shape[-1]) % rows.shape[0]
    bags = torch.embedding_bag(rows, source, starts, False, 0, False, weight.flatten().index_select(0, order))
    return bags[0].view_as(target)


def _dots(table: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """rows[i]·table[index[c, d, i, p]]: a product of two matrices at given places."""
    points = index.shape[-1]
    flat = index.flatten()
    rows = rows.repeat(4, 1)
    # torch knows no sparse matrix with more entries than places, which a map of a few cells would need.
    if table.device.type != "cpu" or points > table.shape[0]:
        return (table[flat].view(-1, points, table.shape[1]) * rows[:, None]).sum(-1)
    starts = torch.arange(0, flat.numel() + 1, points, dtype=flat.dtype, device=flat.device)
    with _without_sparse_warning():
        places = torch.sparse_csr_tensor(
            starts, flat, table.new_zeros(flat.numel()), (rows.shape[0], table.shape[0]), check_invariants=False
        )
        return torch.sparse.sampled_addmm(places, rows, table.t(), beta=0.0).values()


def _without_sparse_warning() -> AbstractContextManager[Any]:
    """torch warns that CSR tensors are new, which is nothing that a user could act on: once, or as often as told to."""
    _first_sparse_tensor()
    return _ignoring_warnings() if torch.is_warn_always_enabled() else nullcontext()


@contextmanager
def _ignoring_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@functools.cache
def _first_sparse_tensor() -> None:
    with _ignoring_warnings():
        torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1))


deformable_attention = DEFORMABLE_ATTENTION.register("torch", forward, backward, exported=reference)
