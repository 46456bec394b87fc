"""VCD and AGLA: noise, scores, masks; the second stream equals a computation without cache at every step."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from vlm_tools import AGLA, VCD, intervene
from vlm_tools.methods.agla import assemble, keep_salient, keep_share, masked_view, smooth_map
from vlm_tools.methods.vcd import contrast, diffuse
from vlm_tools.testing.random_models import random_inputs, random_model

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", ["test_llava", "test_qwen2_5_vl", "test_paligemma", "test_gemma3"])
@pytest.mark.parametrize("beams", [1, 2])
def test_second_stream_equals_an_uncached_one(name: str, beams: int) -> None:
    torch.manual_seed(0)
    model: Any = random_model(name)
    inputs = random_inputs(name)
    method = VCD(1.0, plausibility=1e-6)
    noisy = {**inputs, "pixel_values": diffuse(inputs["pixel_values"], 500)}
    with intervene(model, method):
        out = model.generate(
            **inputs,
            max_new_tokens=4,
            do_sample=False,
            num_beams=beams,
            return_dict_in_generate=True,
            output_scores=True,
        )
    sequence = out.sequences[:1]
    length = inputs["input_ids"].shape[1]
    if beams > 1:
        assert sequence.shape[1] == length + 4
        return
    for step, got in enumerate(out.scores):
        grown = []
        for prompt in (inputs, noisy):
            longer = dict(prompt)
            for key in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
                if key in longer:
                    filler = (
                        longer[key][:, -1:] if key != "mm_token_type_ids" else torch.zeros_like(longer[key][:, -1:])
                    )
                    longer[key] = torch.cat([longer[key], filler.expand(-1, step)], dim=1)
            longer["input_ids"] = sequence[:, : length + step]
            if name == "test_paligemma" and step:
                longer["token_type_ids"][:, length:] = 1
            with torch.no_grad():
                grown.append(model(**longer).logits[:, -1].float())
        want = contrast(*grown, 1.0, 1e-6).log_softmax(-1)
        torch.testing.assert_close(got, want, atol=5e-4, rtol=0)


def test_scores_equal_their_formulas() -> None:
    z, other = torch.tensor([[2.0, 1.0, -9.0]]), torch.tensor([[0.5, 2.0, 0.0]])
    assert contrast(z, other, 1.0, 0.1).tolist() == [[3.5, 0.0, -math.inf]]
    assert assemble(z, other, 2.0, 0.3).tolist() == [[3.0, 5.0, -math.inf]]


def test_noise_keeps_its_share_and_its_seed() -> None:
    x = torch.ones(4, 3, 32, 32)
    assert torch.equal(diffuse(x, 500), diffuse(x, 500))
    assert not torch.equal(diffuse(x, 500), diffuse(x, 500, seed=1))
    assert float(diffuse(x, 0).mean()) == pytest.approx(1, abs=0.01)
    assert abs(float(diffuse(x, 999).mean())) < 0.3


def test_relevance_is_enlarged_and_blurred_as_by_scipy() -> None:
    relevance = np.random.default_rng(0).random((24, 24))
    unit = (relevance - relevance.min()) / (relevance.max() - relevance.min())
    large = ndimage.zoom(unit, 16, order=3, mode="grid-constant", grid_mode=True).clip(0, 1)
    want = ndimage.gaussian_filter(large, 7.68, mode="reflect")
    want = (want - want.min()) / (want.max() - want.min())
    assert np.abs(smooth_map(torch.from_numpy(relevance)) - want).max() < 1e-6


def test_a_better_match_keeps_fewer_pixels() -> None:
    picture = Image.new("RGB", (90, 60), "white")
    relevance = torch.rand(24, 24, generator=torch.Generator().manual_seed(0))
    shares = [(np.asarray(masked_view(picture, relevance, c)) > 0).mean() for c in (0.0, 0.4, 0.8)]
    assert shares == sorted(shares, reverse=True)
    assert shares[2] == pytest.approx(0.6, abs=0.02)
    assert keep_share(-1.0) == 1 - 1e-5
    assert float((keep_salient(torch.randn(2, 3, 20, 20), 0.6) != 0).float().mean()) == pytest.approx(0.6, abs=0.01)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="step must lie in 0 … 999"):
        VCD(step=1000)
    with pytest.raises(ValueError, match="VCD: plausibility"):
        VCD(plausibility=0)
    with pytest.raises(ValueError, match="AGLA: plausibility"):
        AGLA(plausibility=2)
    with pytest.raises(ValueError, match="AGLA: keep must lie"):
        AGLA(keep=2)
    model, inputs = random_model("test_llava"), random_inputs("test_llava")
    with intervene(model, AGLA(torch.zeros(1, 3, 4, 4))), pytest.raises(ValueError, match="view has shape"):
        model.generate(**inputs, max_new_tokens=1)
