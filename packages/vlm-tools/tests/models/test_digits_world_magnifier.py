"""The digits-world magnifier: what each form sees, its size, its options; refusals."""

from typing import Any

import pytest
import torch

from vlm_tools import create_model
from vlm_tools.data.cell_questions import CellQuestions
from vlm_tools.data.digits_world import scene
from vlm_tools.models.digits_world_magnifier import DigitsWorldMagnifier


def test_without_the_magnifier_equal_averages_give_equal_logits_and_with_it_they_do_not() -> None:
    image = torch.rand(1, 1, 36, 36)
    moved = image.clone()
    moved[..., 0, 0], moved[..., 1, 1] = image[..., 1, 1], image[..., 0, 0]
    cell = torch.tensor([0])
    for magnify in (False, True):
        torch.manual_seed(0)
        net: Any = create_model("digits_world_magnifier", magnify=magnify, threshold=0.0).eval()
        same = torch.allclose(net(image, cell), net(moved, cell), atol=1e-6)
        assert same == (not magnify)
        assert net.decoder.config._attn_implementation == "sdpa"


def test_sizes_follow_the_options() -> None:
    count = {magnify: sum(p.numel() for p in DigitsWorldMagnifier(magnify=magnify).parameters()) for magnify in (0, 1)}
    assert count == {1: 203_146, 0: 151_434}
    net = DigitsWorldMagnifier(width=16, layers=3, per_token=2, start=0, threshold=0.5, warm_up=None)
    assert net.magnifier is not None
    assert sorted(net.magnifier.keys) == ["1", "2"]
    assert (net.magnifier.threshold, net.magnifier.warm_up) == (0.5, None)
    assert net.dense[2].out_features == 2 * 16


def test_questions_are_about_occupied_cells_and_the_same_on_every_machine() -> None:
    data = CellQuestions("test", 20, start=3)
    for number in range(len(data)):
        one = data[number]
        assert one["digit"] == scene("test", 3 + number).cells[one["cell"]] < 10
    assert one["image"].shape == (1, 36, 36)
    with pytest.raises(ValueError, match=r"^CellQuestions: count must be at least 1 .* got count=0, start=0"):
        CellQuestions("test", 0)


def test_refusals() -> None:
    with pytest.raises(
        ValueError, match=r"^DigitsWorldMagnifier: width must be a multiple of 8 .* width=12, per_token=4"
    ):
        DigitsWorldMagnifier(width=12)
    with pytest.raises(
        ValueError, match=r"^DigitsWorldMagnifier: image must be \(B, 1, 36, 36\), got \(1, 1, 35, 36\)"
    ):
        DigitsWorldMagnifier(width=8, layers=3)(torch.rand(1, 1, 35, 36), torch.tensor([0]))
