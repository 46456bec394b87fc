"""VCD: its noise and its scores."""

import math

import pytest
import torch

from vlm_tools import VCD
from vlm_tools.methods.vcd import contrast, diffuse


def test_contrast_equals_its_formula() -> None:
    z, other = torch.tensor([[2.0, 1.0, -9.0]]), torch.tensor([[0.5, 2.0, 0.0]])
    assert contrast(z, other, 1.0, 0.1).tolist() == [[3.5, 0.0, -math.inf]]


def test_noise_keeps_its_share_and_its_seed() -> None:
    x = torch.ones(4, 3, 32, 32)
    assert torch.equal(diffuse(x, 500), diffuse(x, 500))
    assert not torch.equal(diffuse(x, 500), diffuse(x, 500, seed=1))
    assert float(diffuse(x, 0).mean()) == pytest.approx(1, abs=0.01)
    assert abs(float(diffuse(x, 999).mean())) < 0.3


def test_refusals() -> None:
    with pytest.raises(ValueError, match="step must lie in 0 … 999"):
        VCD(step=1000)
    with pytest.raises(ValueError, match="VCD: plausibility"):
        VCD(plausibility=0)
