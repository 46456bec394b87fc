"""What a difference is worth: McNemar's exact paired test and bootstrap intervals.

Source: McNemar, Psychometrika 1947; Efron, Annals of Statistics 1979.
Checked in ``tests/hallucination/test_statistics.py``.
"""

import math
from collections.abc import Sequence

import numpy as np


def mcnemar(before: Sequence[bool], after: Sequence[bool]) -> float:
    """Two-sided exact p-value that two methods are right equally often on the same questions.

    Raises:
        ValueError: the sequences differ in length or are empty.
    """
    if len(before) != len(after) or not len(before):
        raise ValueError(f"mcnemar: both methods need the same questions, got {len(before)} and {len(after)} answers")
    gained = sum(b and not a for a, b in zip(before, after, strict=True))
    lost = sum(a and not b for a, b in zip(before, after, strict=True))
    total = gained + lost
    tail = sum(math.comb(total, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**total)


def interval(values: Sequence[float], *, level: float = 0.95, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """Bootstrap percentile interval of the mean.

    Raises:
        ValueError: no values, a level outside (0, 1), no draws.
    """
    if not len(values):
        raise ValueError("interval: there are no values")
    if not 0 < level < 1 or draws < 1:
        raise ValueError(f"interval: level must lie in (0, 1) and draws be positive, got level={level}, draws={draws}")
    data = np.asarray(values, dtype=float)
    index = np.random.default_rng(seed).integers(len(data), size=(draws, len(data)))
    low, high = np.quantile(data[index].mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
