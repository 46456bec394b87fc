"""Grids as the kernels see them, with three axes, and boxes of cells for their tiles."""

import math
from collections.abc import Sequence


def three(values: Sequence[int]) -> tuple[int, ...]:
    """Axes of length, kernel size, dilation or stride 1 in front."""
    return (*[1] * (3 - len(values)), *values)


def dilations(dilation: Sequence[int], grid: Sequence[int]) -> tuple[int, ...]:
    """One for each of three axes; a larger one than the axis leaves each cell alone, as one of its length does."""
    return tuple(min(step, n) for step, n in zip(three(dilation), grid, strict=True))


def box(grid: Sequence[int], dilation: Sequence[int], cells: int) -> list[int]:
    """Sides of a tile's box, powers of two: as equal as the grid allows, for the least rim."""
    available = [math.ceil(n / step) for n, step in zip(grid, dilation, strict=True)]
    sides = [1, 1, 1]
    while math.prod(sides) < cells:
        open_axes = [a for a in range(3) if sides[a] < available[a]] or [2]
        sides[min(reversed(open_axes), key=lambda axis: sides[axis])] *= 2
    return sides


def tiles(grid: Sequence[int], dilation: Sequence[int], sides: Sequence[int]) -> list[int]:
    """Boxes along each axis, those of all residues."""
    return [step * math.ceil(math.ceil(n / step) / side) for n, step, side in zip(grid, dilation, sides, strict=True)]
