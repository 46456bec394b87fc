"""Routes over grids, against orders that were written down by hand."""

import numpy as np
import pytest
import torch

from medical_seg.layers.state_space.routes import PATTERNS, Pattern, route_pair, route_tables

# Places of a 3×4 map in the order of the visit.
BY_HAND = {
    "C": ([0, 1, 2, 3, 7, 6, 5, 4, 8, 9, 10, 11], [0, 4, 8, 9, 5, 1, 2, 6, 10, 11, 7, 3]),
    "X": ([0, 1, 4, 8, 5, 2, 3, 6, 9, 10, 7, 11], [3, 2, 7, 11, 6, 1, 0, 5, 10, 9, 4, 8]),
    "S": ([0, 1, 2, 3, 7, 11, 10, 9, 8, 4, 5, 6], [8, 9, 10, 11, 7, 3, 2, 1, 0, 4, 5, 6]),
    "Z": (list(range(12)), [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11]),
}


def by_definition(pattern: Pattern, height: int, width: int) -> list[list[int]]:
    """The same orders, place by place, in the words of the paper's table."""
    at = [(i, j) for i in range(height) for j in range(width)]
    if pattern == "C":
        first = sorted(at, key=lambda p: (p[0], -p[1] if p[0] % 2 else p[1]))
        second = sorted(at, key=lambda p: (p[1], -p[0] if p[1] % 2 else p[0]))
    elif pattern == "X":
        first = sorted(at, key=lambda p: (sum(p), p[0] if sum(p) % 2 else -p[0]))
        second = [(i, width - 1 - j) for i, j in first]
    elif pattern == "S":
        first, (i, j), (di, dj) = [], (0, 0), (0, 1)
        while len(first) < len(at):
            first.append((i, j))
            if (i + di, j + dj) not in at or (i + di, j + dj) in first:
                di, dj = dj, -di  # to the right
            i, j = i + di, j + dj
        second = [(height - 1 - i, j) for i, j in first]
    else:
        first, second = at, sorted(at, key=lambda p: (p[1], p[0]))
    return [[i * width + j for i, j in order] for order in (first, second)]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_orders_are_those_written_down_for_any_grid(pattern: Pattern) -> None:
    assert route_pair(pattern, 3, 4).tolist() == list(BY_HAND[pattern])
    for height, width in [(4, 4), (5, 7), (6, 3), (8, 8), (1, 5), (5, 1), (1, 1), (2, 9)]:
        assert route_pair(pattern, height, width).tolist() == by_definition(pattern, height, width)


def test_inverses_put_every_token_back() -> None:
    orders, inverses = route_tables(PATTERNS, 5, 7, torch.device("cpu"))
    assert orders.shape == (8, 35)
    x = torch.arange(35)
    for order, inverse in zip(orders, inverses, strict=True):
        assert torch.equal(x[order][inverse], x)
    assert np.array_equal(orders[4].numpy(), route_pair("S", 5, 7)[0])
    assert route_tables(PATTERNS, 5, 7, torch.device("cpu"))[0] is orders  # kept
