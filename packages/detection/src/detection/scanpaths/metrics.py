"""How alike two scanpaths are, and how a search went.

Sequence score: Needleman and Wunsch 1970, as Yang et al., CVPR 2020, arXiv 2005.14310, score objects. MultiMatch:
Jarodzka, Holmqvist, Nyström, ETRA 2010; Dewhurst et al., Behavior Research Methods 2012. Shares: OAT, arXiv 2407.13335,
whose code (``evaluation/saliency_metric.py``, ``evaluation_model.py`` and ``MM/multimatch.py``, after multimatch_gaze)
gives the same numbers. Checked in: ``scanpaths/test_metrics.py``.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import fmean
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
SHARES = ("correct_target", "length", "search", "refixation", "revisit")
MULTIMATCH = ("shape", "direction", "length", "position")


def sequence_score(path: Sequence[int], truth: Sequence[int]) -> float:
    """Longest common subsequence over the longer length, in [0, 1]: alignment with match 1, gap and mismatch 0.

    Raises: ValueError if both paths are empty.
    """
    if not path and not truth:
        raise ValueError("sequence_score: both paths are empty")
    best = [0] * (len(truth) + 1)
    for place in path:
        above = 0
        for j, other in enumerate(truth, 1):
            above, best[j] = best[j], max(best[j], best[j - 1], above + (place == other))
    return best[-1] / max(len(path), len(truth))


class MultiMatch(NamedTuple):
    """Similarities in [0, 1]; NaN for a path with fewer than three fixations, as in multimatch_gaze."""

    shape: float
    direction: float
    length: float
    position: float


def multimatch(a: Points, b: Points, size: tuple[float, float]) -> MultiMatch:
    """Saccades of two scanpaths, aligned by their vectors and compared in four ways; nothing is simplified before.

    The alignment is the way through the matrix of vector differences, from its first to its last cell, right, down or
    both, that adds up to the least; of what it pairs, medians count.

    Args:
        a, b: fixations (N, 2) as x, y. size: width and height of the picture, in the same unit.
    """
    if min(len(a), len(b)) < 3:
        return MultiMatch(*[math.nan] * 4)
    first, second = (np.diff(points, axis=0) for points in (a, b))
    apart = np.linalg.norm(first[:, None] - second, axis=2)
    i, j = _alignment(apart)
    diagonal = math.hypot(*size)
    turned = np.abs(_angle(first[i]) - _angle(second[j]))
    turned = np.minimum(turned, 2 * math.pi - turned)
    lengths = np.abs(np.linalg.norm(first[i], axis=1) - np.linalg.norm(second[j], axis=1))
    moved = np.linalg.norm(a[i] - b[j], axis=1)
    return MultiMatch(
        1 - float(np.median(apart[i, j])) / (2 * diagonal),
        1 - float(np.median(turned)) / math.pi,
        1 - float(np.median(lengths)) / diagonal,
        1 - float(np.median(moved)) / diagonal,
    )


def _alignment(apart: Points) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Rows and columns of the cheapest way; the first cell costs nothing, since every way has it."""
    cost = np.full((apart.shape[0] + 1, apart.shape[1] + 1), np.inf)
    for i, row in enumerate(apart):
        for j, value in enumerate(row):
            before = min(cost[i, j], cost[i, j + 1], cost[i + 1, j])
            cost[i + 1, j + 1] = value + before if i or j else 0.0
    i, j = (side - 1 for side in apart.shape)
    way = [(i, j)]
    while i or j:
        i, j = min(((i - 1, j - 1), (i - 1, j), (i, j - 1)), key=lambda cell: cost[cell[0] + 1, cell[1] + 1])
        way.append((i, j))
    rows, columns = zip(*way[::-1], strict=True)
    return np.array(rows), np.array(columns)


def _angle(vectors: Points) -> Points:
    return np.arctan2(vectors[:, 1], vectors[:, 0])


def centers(path: Sequence[int], cells: NDArray[np.integer]) -> Points:
    """Fixations (N, 2) as x, y in cells: the middle of each object."""
    return np.asarray(cells)[list(path)][:, ::-1].astype(np.float64).reshape(-1, 2) + 0.5


def behavior(path: Sequence[int], target: int) -> dict[str, float]:
    """One search: ended at the target, fixations, and which share of them was on new objects (search), on the same
    object as the one before (refixation) and on objects of earlier (revisit).

    Raises: ValueError for an empty path.
    """
    if not path:
        raise ValueError("behavior: the path is empty")
    counts = {"search": 0, "refixation": 0, "revisit": 0}
    before: set[int] = set()
    for place, group in groupby(path):
        counts["revisit" if place in before else "search"] += 1
        counts["refixation"] += len(list(group)) - 1
        before.add(place)
    shares = {name: count / len(path) for name, count in counts.items()}
    return {"correct_target": float(path[-1] == target), "length": float(len(path)), **shares}


def mean_behavior(searches: Sequence[tuple[Sequence[int], int]]) -> dict[str, float]:
    """Means of `behavior` over (path, target).

    Raises: ValueError if there are none.
    """
    if not searches:
        raise ValueError("mean_behavior: there are no searches")
    found = [behavior(path, target) for path, target in searches]
    return {name: fmean(one[name] for one in found) for name in SHARES}


def behavior_delta(own: Mapping[str, float], truth: Mapping[str, float]) -> float:
    """Mean relative difference of the five means to those of the truth; what the truth never does is left out."""
    parts = [abs(own[name] - truth[name]) / truth[name] for name in SHARES if truth[name]]
    return fmean(parts) if parts else 0.0
