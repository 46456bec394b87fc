"""McNemar's test and bootstrap intervals."""

import numpy as np
import pytest

from vlm_tools.hallucination.statistics import interval, mcnemar


def test_statistics() -> None:
    assert mcnemar([True] * 10, [True] * 10) == 1
    assert mcnemar([False] * 6, [True] * 6) == pytest.approx(2 / 64)
    low, high = interval([0, 1] * 200)
    assert 0.44 < low < 0.5 < high < 0.56
    with pytest.raises(ValueError, match="same questions"):
        mcnemar([], [])
    with pytest.raises(ValueError, match="no values"):
        interval([])
    with pytest.raises(ValueError, match="level must lie"):
        interval([1.0], level=2)


def test_more_draws_settle_the_interval() -> None:
    values = [0.0, 1.0] * 20
    few, many = ([interval(values, draws=draws, seed=seed) for seed in range(8)] for draws in (20, 2000))
    assert np.std(np.array(many), 0).max() < np.std(np.array(few), 0).min()
