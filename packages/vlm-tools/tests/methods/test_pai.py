"""PAI: the edit of one row, its guidance, refusals."""

import math

import pytest
import torch

from vlm_tools import PAI
from vlm_tools.methods.pai import grow, guide


def test_grow_adds_a_share_of_the_size_and_keeps_hidden_keys_hidden() -> None:
    scores = torch.tensor([2.0, -4.0, -math.inf, 1.0])
    chosen = torch.tensor([True, True, True, False])
    assert grow(scores, chosen, 0.5).tolist() == [3.0, -2.0, -math.inf, 1.0]


def test_guidance_equals_its_formula() -> None:
    torch.manual_seed(0)
    z, other = torch.randn(2, 9), torch.randn(2, 9)
    with_image, without = z.log_softmax(-1), other.log_softmax(-1)
    want = 1.1 * with_image - 0.1 * without
    got = guide(z, other, 1.1, 0.1)
    kept = got.isfinite()
    torch.testing.assert_close(got[kept], want[kept])
    assert torch.equal(kept, with_image >= with_image.amax(-1, keepdim=True) + math.log(0.1))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="alpha must not be negative"):
        PAI(-1)
    with pytest.raises(ValueError, match="plausibility must lie in"):
        PAI(plausibility=0)
