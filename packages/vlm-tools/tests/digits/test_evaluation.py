"""Scores of answers and captions of the digits world."""

import pytest
import torch

from vlm_tools.digits.evaluation import scores_of


def test_scores_count_mentions_of_absent_digits() -> None:
    present = torch.zeros(3, 10, dtype=torch.bool)
    present[0, 3] = present[1, [1, 2]] = present[2, [5, 6]] = True
    found = scores_of(present, present, ["a three and a four and a four", "a one", "a five"])
    assert found.chair_s == pytest.approx(1 / 3)
    assert found.chair_i == pytest.approx(2 / 5)
    assert found.recall == pytest.approx(3 / 5)
    assert found.repeated == pytest.approx(1 / 5)
    assert found.accuracy("adversarial") == 1
    with pytest.raises(ValueError, match="do not fit"):
        scores_of(present, present, [])
