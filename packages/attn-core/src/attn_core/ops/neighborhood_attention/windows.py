"""Which cells a query sees along one axis, and the axis cut into spans of queries with the keys that they see."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor


def per_axis(value: Any, axes: int) -> tuple[Any, ...]:
    """One value for each axis: a number stands for all."""
    return tuple(value) if isinstance(value, Sequence) else (value,) * axes


def outer(rows: Tensor, axis: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Combine (N, M) and (n, m) into (N·n, M·m), row-major on both sides."""
    return combine(rows[:, None, :, None], axis[None, :, None, :]).flatten(2, 3).flatten(0, 1)


@dataclass(frozen=True)
class Axis:
    """The rule of one axis; positions below count cells of one residue modulo the dilation."""

    length: int
    kernel: int
    dilation: int
    stride: int
    causal: bool
    shifted: bool

    def cells(self, residue: int) -> int:
        """Number of cells of the grid that have this remainder modulo the dilation."""
        return -(-(self.length - residue) // self.dilation)

    def window(self, p: int, cells: int) -> tuple[int, int]:
        """First and last position that position ``p`` sees."""
        if self.causal:
            leader = min(p // self.stride * self.stride + self.stride - 1, cells - 1)
            return max(leader - self.kernel + 1, 0), p
        leader = min(p // self.stride * self.stride + self.stride // 2, cells - 1)
        first = leader - self.kernel // 2
        if self.shifted:
            first = min(max(first, 0), cells - self.kernel)
        return max(first, 0), min(first + self.kernel, cells) - 1


@dataclass(frozen=True)
class Pattern:
    """What a span looks like wherever it lies: the window of each query, counted from the span's first key."""

    first: tuple[int, ...]
    last: tuple[int, ...]
    keys: int
    lead: int  # position of the first query − that of the first key


@dataclass(frozen=True)
class Span:
    """Queries of one residue side by side, and the keys from the first to the last that any of them sees."""

    queries: slice
    keys: slice
    pattern: Pattern


@functools.lru_cache(maxsize=256)
def spans(axis: Axis, extent: int) -> tuple[Span, ...]:
    """The axis cut into spans of ``extent`` queries."""
    result = []
    for residue in range(min(axis.dilation, axis.length)):
        cells = axis.cells(residue)
        for start in range(0, cells, extent):
            stop = min(start + extent, cells)
            windows = [axis.window(p, cells) for p in range(start, stop)]
            low, high = min(first for first, _ in windows), max(last for _, last in windows) + 1
            pattern = Pattern(
                tuple(first - low for first, _ in windows),
                tuple(last - low for _, last in windows),
                high - low,
                start - low,
            )
            result.append(Span(_slice(axis, residue, start, stop), _slice(axis, residue, low, high), pattern))
    return tuple(result)


def _slice(axis: Axis, residue: int, start: int, stop: int) -> slice:
    return slice(residue + start * axis.dilation, residue + (stop - 1) * axis.dilation + 1, axis.dilation)


# Measured on a CPU core, in seconds: starting one tile, one multiply-add of a product, moving one number of a key.
TILE_COST, PRODUCT_COST, KEY_COST = 1.2e-4, 4e-11, 1e-9
# The scores of one head of a tile: 2²⁰ float32 are 4 MiB.
MAX_TILE_SCORES = 2**20


@functools.lru_cache(maxsize=256)
def extents(axes: tuple[Axis, ...], images: int, width: int) -> tuple[int, ...]:
    """Queries of a tile along each axis: wide tiles waste scores on keys out of sight, narrow ones waste starts.

    Args:
        images: batch × heads. width: D + Dv.
    """
    sizes = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512]
    choices: list[tuple[int, ...]] = [()]
    for axis in axes:
        cells = axis.cells(0)
        own = sorted({min(size, cells) for size in sizes} | {-(-cells // parts) for parts in (2, 3, 4, 6, 8)})
        choices = [(*choice, size) for choice in choices for size in own]

    def cost(choice: tuple[int, ...]) -> float:
        tiles = keys = 1
        for axis, size in zip(axes, choice, strict=True):
            tiles *= min(axis.dilation, axis.length) * -(-axis.cells(0) // size)
            keys *= min(axis.cells(0), size + axis.kernel + axis.stride - 2)
        queries = math.prod(choice)
        if queries > 1 and queries * keys > MAX_TILE_SCORES:
            return math.inf
        return tiles * (TILE_COST + images * width * keys * (PRODUCT_COST * queries + KEY_COST))

    return min(choices, key=cost)
