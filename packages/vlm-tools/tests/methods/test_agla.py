"""AGLA: relevance maps, masked views, its scores."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage

from vlm_tools import AGLA, intervene
from vlm_tools.methods.agla import assemble, keep_salient, keep_share, masked_view, smooth_map
from vlm_tools.testing.random_models import random_inputs, random_model

pytestmark = pytest.mark.filterwarnings("ignore")


def test_assembled_scores_equal_their_formula() -> None:
    z, other = torch.tensor([[2.0, 1.0, 0.5]]), torch.tensor([[0.5, 2.0, 0.0]])
    assert assemble(z, other, 2.0, 0.3).tolist() == [[3.0, 5.0, -math.inf]]  # cut: 2 + log 0.3 = 0.8


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


def test_the_share_of_pixels_is_kept_in_each_tile_and_of_each_list_of_patches() -> None:
    tiles = torch.randn(2, 3, 3, 10, 10)
    shares = (keep_salient(tiles, 0.3) != 0).float().mean((2, 3, 4))
    assert float((shares - 0.3).abs().max()) < 0.02
    patches = torch.cat([torch.randn(40, 12), 3 * torch.randn(20, 12)])
    kept = keep_salient(patches, 0.5, rows=[40, 20]).abs().sum(1) > 0
    assert [int(part.sum()) for part in kept.split([40, 20])] == [20, 10]
    assert int((keep_salient(patches, 0.0) != 0).sum()) == 0


def test_refusals() -> None:
    with pytest.raises(ValueError, match="AGLA: plausibility"):
        AGLA(plausibility=2)
    with pytest.raises(ValueError, match="AGLA: keep must lie"):
        AGLA(keep=2)
    model, inputs = random_model("test_llava"), random_inputs("test_llava")
    with intervene(model, AGLA(torch.zeros(1, 3, 4, 4))), pytest.raises(ValueError, match="view has shape"):
        model.generate(**inputs, max_new_tokens=1)
