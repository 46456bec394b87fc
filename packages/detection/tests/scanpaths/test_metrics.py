"""Likeness of scanpaths and the shares of a search, against definitions that are written out."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detection.scanpaths.metrics import (
    behavior,
    behavior_delta,
    centers,
    mean_behavior,
    multimatch,
    sequence_score,
)

PATHS = st.lists(st.integers(0, 4), min_size=1, max_size=6)
rng = np.random.default_rng(0)


@given(PATHS, PATHS)
def test_the_sequence_score_is_the_longest_common_subsequence(path: list[int], truth: list[int]) -> None:
    def common(a: list[int]) -> set[tuple[int, ...]]:
        return {tuple(part) for n in range(len(a) + 1) for part in itertools.combinations(a, n)}

    longest = max(map(len, common(path) & common(truth)))
    assert sequence_score(path, truth) == longest / max(len(path), len(truth))


def ways(rows: int, columns: int) -> list[list[tuple[int, int]]]:
    """Every way from the first cell to the last, right, down or both."""
    if (rows, columns) == (1, 1):
        return [[(0, 0)]]
    before = [(rows - 1, columns), (rows, columns - 1), (rows - 1, columns - 1)]
    return [[*way, (rows - 1, columns - 1)] for r, c in before if r and c for way in ways(r, c)]


def test_multimatch_takes_medians_along_the_cheapest_of_all_ways() -> None:
    for _ in range(20):
        a, b = rng.random((rng.integers(3, 6), 2)) * [16, 9], rng.random((rng.integers(3, 6), 2)) * [16, 9]
        first, second = a[1:] - a[:-1], b[1:] - b[:-1]
        cost = [[math.dist(p, q) for q in second] for p in first]
        best = min(ways(len(first), len(second)), key=lambda way: sum(cost[i][j] for i, j in way))

        def angle(p: np.ndarray, q: np.ndarray) -> float:
            return math.acos(np.clip(p @ q / np.linalg.norm(p) / np.linalg.norm(q), -1, 1))

        diagonal = math.hypot(16, 9)
        expected = (
            1 - np.median([cost[i][j] for i, j in best]) / (2 * diagonal),
            1 - np.median([angle(first[i], second[j]) for i, j in best]) / math.pi,
            1 - np.median([abs(math.hypot(*first[i]) - math.hypot(*second[j])) for i, j in best]) / diagonal,
            1 - np.median([math.dist(a[i], b[j]) for i, j in best]) / diagonal,
        )
        assert multimatch(a, b, (16, 9)) == pytest.approx(expected, abs=1e-7)


def test_equal_paths_are_alike_and_short_ones_have_no_likeness() -> None:
    points = rng.random((5, 2))
    assert multimatch(points, points, (1, 1)) == (1, 1, 1, 1)
    assert multimatch(points, points * [1, -1] + [0, 1], (1, 1)).length == 1
    assert all(map(math.isnan, multimatch(points[:2], points, (1, 1))))
    cells = np.array([[0, 0], [0, 1], [1, 0]])
    assert centers([2, 1], cells).tolist() == [[0.5, 1.5], [1.5, 0.5]]


@pytest.mark.parametrize(
    ("path", "counts"),
    [
        ([3], (1, 0, 0)),
        ([1, 1, 2], (2, 1, 0)),
        ([1, 2, 1], (2, 0, 1)),
        ([1, 1, 2, 1, 1, 3], (3, 2, 1)),
        ([2, 2, 2], (1, 2, 0)),
    ],
)
def test_every_fixation_is_search_refixation_or_revisit(path: list[int], counts: tuple[int, ...]) -> None:
    found = behavior(path, 3)
    assert tuple(found[name] * len(path) for name in ("search", "refixation", "revisit")) == pytest.approx(counts)
    assert found["length"] == len(path)
    assert found["correct_target"] == (path[-1] == 3)


def test_means_and_their_relative_difference() -> None:
    own = mean_behavior([([1, 3], 3), ([1, 1, 1, 1], 3)])
    assert own == {"correct_target": 0.5, "length": 3, "search": 0.625, "refixation": 0.375, "revisit": 0}
    truth = {"correct_target": 1.0, "length": 2.0, "search": 0.625, "refixation": 0.0, "revisit": 0.0}
    assert behavior_delta(own, truth) == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert behavior_delta(own, dict.fromkeys(own, 0.0)) == 0


def test_nothing_to_compare_is_named() -> None:
    with pytest.raises(ValueError, match="sequence_score: both paths are empty"):
        sequence_score([], [])
    with pytest.raises(ValueError, match="behavior: the path is empty"):
        behavior([], 0)
    with pytest.raises(ValueError, match="mean_behavior: there are no searches"):
        mean_behavior([])
