"""What both tests of boundary matching compare with: the published mask, written out sample by sample."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

Mask = Callable[[int, int, int, float], Tensor]


@pytest.fixture
def mask_of_samples() -> Mask:
    """(steps, bins, samples of a bin, ratio) → the mask."""
    return _mask_of_samples


def _mask_of_samples(steps: int, bins: int, per_bin: int, ratio: float) -> Tensor:
    """(T, N, start, end): the published mask. A sample between −1 and 0 counts wholly for the first step."""
    mask = torch.zeros(steps, bins, steps, steps, dtype=torch.float64)
    for start in range(steps):
        for end in range(start, steps):
            length = end + 1 - start
            low, high = start - ratio * (length + 1), end + 1 + ratio * (length + 1)
            for k in range(bins * per_bin):
                place = low + (high - low) * k / max(bins * per_bin - 1, 1)
                whole = math.trunc(place)  # towards zero
                for step, weight in ((whole, 1 - (place - whole)), (math.ceil(place), place - whole)):
                    if 0 <= step < steps:
                        mask[step, k // per_bin, start, end] += weight / per_bin
    return mask
