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
    pair = route_pair.__wrapped__ if torch.compiler.is_compiling() else route_pair  # a trace warns of caches
    orders = np.concatenate([pair(pattern, height, width) for pattern in patterns])
    return torch.as_tensor(orders, device=device), torch.as_tensor(orders.argsort(1), device=device)


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


# Below: made of torch's own operators at each call, so that a traced graph makes them, too.


def along_each_axis(grid: tuple[int, ...], device: torch.device) -> Int[Tensor, "R T"]:
    """One order for each axis, which runs fastest in it: the last axis first. In a plane rows, then columns."""
    places = _row_major(grid, device)
    return torch.stack([places.movedim(axis, -1).flatten() for axis in reversed(range(len(grid)))])


def by_windows(grid: tuple[int, ...], side: int, device: torch.device) -> Int[Tensor, " T"]:
    """Windows row by row, and inside each row by row; those at the far edges are as large as the grid leaves them."""
    places = _row_major(grid, device)
    window = torch.zeros_like(places)
    for axis, length in enumerate(grid):
        along = (torch.arange(length, device=device) // side).view(-1, *[1] * (len(grid) - axis - 1))
        window = window * -(-length // side) + along
    return (window * places.numel() + places).flatten().argsort()


def sparse(grid: tuple[int, ...], step: int, device: torch.device) -> tuple[Int[Tensor, "K L"], Int[Tensor, " T"]]:
    """The stepⁿ grids of every ``step``-th place along each axis, one a row, and where each place went in them.

    Those that begin at an odd place of the first axis are read with that axis running fastest, the others row by row.
    A sequence shorter than the longest is filled up behind its end with place 0, which a walk from the beginning meets
    after all that counts. The second table holds numbers in the flattened first.
    """
    places = _row_major(grid, device)
    length = math.prod([-(-side // step) for side in grid])  # a list: Dynamo takes no generator here
    orders, visited, at = [], [], []
    for k, starts in enumerate(product(range(step), repeat=len(grid))):
        starts = starts[::-1]  # the first axis changes fastest
        part = places[tuple(slice(start, None, step) for start in starts)]
        part = (part.movedim(0, -1) if starts[0] % 2 else part).flatten()
        orders.append(torch.cat([part, part.new_zeros(length - part.numel())]))
        visited.append(part)
        at.append(k * length + torch.arange(part.numel(), device=device))
    return torch.stack(orders), torch.cat(at)[torch.cat(visited).argsort()]


def across_slices(grid: tuple[int, ...], device: torch.device) -> Int[Tensor, " T"]:
    """All slices at one place, then at the next: the first axis runs fastest, the others row by row."""
    return _row_major(grid, device).movedim(0, -1).flatten()


def _row_major(grid: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.arange(math.prod(grid), device=device).view(grid)
