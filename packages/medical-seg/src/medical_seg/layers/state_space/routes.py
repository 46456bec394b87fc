"""Routes over a grid: orders in which a scan visits the tokens of a map, for any height and width.

Paper: Ji, MHS-VM, arXiv 2406.05992, section 3.2. Official code: https://github.com/PixDeep/MHS-VM (Apache-2.0),
scanutils.py and routegen.py, which writes tables of one size to a file. Same: every order. Differs: tables are made
when a grid is first met, that of a single token included, where the official spiral fails.
Checked: tests/layers/state_space/test_routes.py, against orders written down by hand.
"""

import math
from functools import cache
from itertools import product
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

Pattern = Literal["C", "X", "S", "Z"]
PATTERNS: tuple[Pattern, ...] = ("C", "X", "S", "Z")


@cache
def route_pair(pattern: Pattern, height: int, width: int) -> Int[np.ndarray, "2 T"]:
    """Two orders of the tokens, as places in the row-major map.

    C: rows, then columns, to and fro. X: anti-diagonals from the upper left, then from the upper right, to and fro.
    S: a spiral inwards from the upper left, then from the lower left. Z: rows, then columns, always forwards.
    """
    grid = np.arange(height * width).reshape(height, width)
    if pattern == "C":
        first, second = _boustrophedon(grid), _boustrophedon(grid.T)
    elif pattern == "X":
        first, second = _diagonals(grid), _diagonals(grid[:, ::-1])
    elif pattern == "S":
        first, second = _spiral(grid), _spiral(grid[::-1])
    else:
        first, second = grid.ravel(), grid.T.ravel()
    return np.stack([first, second])


def route_tables(
    patterns: tuple[Pattern, ...], height: int, width: int, device: torch.device
) -> tuple[Int[Tensor, "R T"], Int[Tensor, "R T"]]:
    """The orders of all patterns, two each, and their inverses: ``y[order] = x`` is undone by ``x = y[inverse]``."""
    if torch.compiler.is_compiling():
        return _tables(patterns, height, width, device)  # tensors of a trace must not be kept
    return _kept_tables(patterns, height, width, device)


def _tables(patterns: tuple[Pattern, ...], height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    orders = np.concatenate([route_pair(pattern, height, width) for pattern in patterns])
    return torch.tensor(orders, device=device), torch.tensor(orders.argsort(1), device=device)


_kept_tables = cache(_tables)


def _boustrophedon(grid: np.ndarray) -> np.ndarray:
    grid = grid.copy()
    grid[1::2] = grid[1::2, ::-1]
    return grid.ravel()


def _diagonals(grid: np.ndarray) -> np.ndarray:
    """Anti-diagonals i + j = k: of even k upwards, of odd k downwards."""
    height, width = grid.shape
    parts = [np.diagonal(grid[::-1], k - height + 1) for k in range(height + width - 1)]  # from below, upwards
    return np.concatenate([part if k % 2 == 0 else part[::-1] for k, part in enumerate(parts)])


def _spiral(grid: np.ndarray) -> np.ndarray:
    """Clockwise inwards: the upper row, then what is left of the grid, turned so that its right side is above."""
    parts = []
    while grid.size:
        parts.append(grid[0])
        grid = np.rot90(grid[1:])
    return np.concatenate(parts)


def along_each_axis(grid: tuple[int, ...]) -> Int[np.ndarray, "R T"]:
    """One order for each axis, which runs fastest in it: the last axis first. In a plane rows, then columns."""
    places = np.arange(math.prod(grid)).reshape(grid)
    return np.stack([np.moveaxis(places, axis, -1).ravel() for axis in reversed(range(len(grid)))])


def by_windows(grid: tuple[int, ...], side: int) -> Int[np.ndarray, " T"]:
    """Windows row by row, and inside each row by row; those at the far edges are as large as the grid leaves them."""
    coordinates = np.indices(grid).reshape(len(grid), -1)
    keys = [*(coordinates // side), *coordinates]  # the most significant first
    return np.lexsort(keys[::-1])


def sparse(grid: tuple[int, ...], step: int) -> tuple[Int[np.ndarray, "K L"], Int[np.ndarray, " T"]]:
    """The stepⁿ grids of every ``step``-th place along each axis, one a row, and where each place went in them.

    Those that begin at an odd place of the first axis are read with that axis running fastest, the others row by row.
    A sequence shorter than the longest is filled up behind its end with place 0, which a walk from the beginning meets
    after all that counts. The second table holds numbers in the flattened first.
    """
    places = np.arange(math.prod(grid)).reshape(grid)
    length = math.prod(-(-side // step) for side in grid)
    orders, where = np.zeros((step ** len(grid), length), dtype=np.int64), np.zeros(places.size, dtype=np.int64)
    for k, starts in enumerate(product(range(step), repeat=len(grid))):
        starts = starts[::-1]  # the first axis changes fastest
        part = places[tuple(slice(start, None, step) for start in starts)]
        part = (np.moveaxis(part, 0, -1) if starts[0] % 2 else part).ravel()
        orders[k, : part.size] = part
        where[part] = k * length + np.arange(part.size)
    return orders, where


def across_slices(grid: tuple[int, ...]) -> Int[np.ndarray, " T"]:
    """All slices at one place, then at the next: the first axis runs fastest, the others row by row."""
    return np.arange(math.prod(grid)).reshape(grid[0], -1).T.ravel()
