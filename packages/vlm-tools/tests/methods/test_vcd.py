"""VCD: its noise and its scores."""

import math
from typing import Any

import pytest
import torch

from vlm_tools import VCD, intervene
from vlm_tools.methods.vcd import contrast, diffuse


def test_contrast_equals_its_formula() -> None:
    z, other = torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([[0.5, 2.0, 0.0]])
    assert contrast(z, other, 2.0, 0.1).tolist() == [[5.0, -1.0, -math.inf]]  # cut: 2 + log 0.1 = −0.3


def test_noise_keeps_its_share_and_its_seed() -> None:
    x = torch.ones(4, 3, 32, 32)
    assert torch.equal(diffuse(x, 500), diffuse(x, 500))
    assert not torch.equal(diffuse(x, 500), diffuse(x, 500, seed=1))
    assert float(diffuse(x, 0).mean()) == pytest.approx(1, abs=0.01)
    assert abs(float(diffuse(x, 999).mean())) < 0.3


def test_noise_follows_the_published_schedule() -> None:
    kept = 1.0
    for step in range(301):
        kept *= 1 - ((0.5e-2 - 1e-5) / (1 + math.exp(6 - 12 * step / 999)) + 1e-5)
    noise, signal = diffuse(torch.zeros(1, 3, 64, 64), 300), diffuse(torch.ones(1, 3, 64, 64), 300)
    assert float((signal - noise).mean()) == pytest.approx(kept**0.5, abs=1e-5)
    assert float(noise.std()) == pytest.approx((1 - kept) ** 0.5, rel=0.02)
    assert abs(float(noise.mean())) < 0.02


def test_an_image_has_the_noise_that_it_has_alone() -> None:
    x = torch.randn(5, 3, 14, 14)
    both = diffuse(x, 500, rows=[2, 3])
    torch.testing.assert_close(both, torch.cat([diffuse(x[:2], 500), diffuse(x[2:], 500)]), atol=1e-6, rtol=0)
    torch.testing.assert_close(diffuse(x[2:4], 500), both[2:4], atol=1e-6, rtol=0)  # a first tile with fewer behind it


def test_scores_of_a_step_equal_the_published_formula(setting: Any) -> None:
    """Noise of the schedule drawn tile by tile, contrast of both streams, and the cut by the stream with the image."""
    x, kept = setting.inputs["pixel_values"], 1.0
    for step in range(701):
        kept *= 1 - ((0.5e-2 - 1e-5) / (1 + math.exp(6 - 12 * step / 999)) + 1e-5)
    generator = torch.Generator().manual_seed(7)
    noise = torch.stack([torch.randn(tile.shape, generator=generator, dtype=x.dtype) for tile in x])
    noisy = {**setting.inputs, "pixel_values": kept**0.5 * x + (1 - kept) ** 0.5 * noise}
    with torch.no_grad():
        z, other = (setting.model(**inputs).logits[:, -1] for inputs in (setting.inputs, noisy))
    want = (2.5 * z - 1.5 * other).masked_fill(z < z.max() + math.log(0.8), -torch.inf).log_softmax(-1)
    with intervene(setting.model, VCD(1.5, plausibility=0.8, step=700, seed=7)):
        out = setting.model.generate(
            **setting.inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True, output_scores=True
        )
    assert 1 < int(want.isfinite().sum()) < want.numel()
    torch.testing.assert_close(out.scores[0].double(), want, atol=1e-5, rtol=0)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="step must lie in 0 … 999"):
        VCD(step=1000)
    with pytest.raises(ValueError, match="seed must lie in 0 … 9223372036854775807"):
        VCD(seed=2**63)
    with pytest.raises(ValueError, match="VCD: plausibility"):
        VCD(plausibility=0)
