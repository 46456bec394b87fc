"""What the engine trains."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from medical_seg.metrics.dice import Dice
from medical_seg.models import create_model
from medical_seg.tasks.segmentation import SegmentationTask


def test_regions_and_their_labels_must_match_the_network() -> None:
    with pytest.raises(ValueError, match=r"SegmentationTask: 2 regions, 1 labels .* out_channels=2 must be equal"):
        SegmentationTask("test_agunet", (8, 8, 8), regions=[[1, 2], [2]], order=[1])


def test_channels_last_changes_the_layout_and_not_the_loss() -> None:
    image, label = torch.randn(2, 1, 8, 8, 8), torch.randint(0, 2, (2, 8, 8, 8))
    losses = []
    for layout in (True, False):
        torch.manual_seed(0)
        task = SegmentationTask("test_agunet", (8, 8, 8), channels_last=layout)
        weights = [p for p in task.parameters() if p.ndim == 5 and min(p.shape) > 1]
        assert all(p.is_contiguous(memory_format=torch.channels_last_3d) == layout for p in weights)
        losses.append(task.loss(image, label)["loss"])
    assert torch.allclose(*losses, atol=1e-5)


def test_a_criterion_takes_the_place_of_the_default() -> None:
    class Mean(torch.nn.Module):
        def forward(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            assert target.shape == logits[:, 0].shape
            return logits.sum() * 0 + 7

    task = SegmentationTask("test_agunet", (8, 8, 8), criterion=Mean())
    loss = task.loss(torch.randn(1, 1, 8, 8, 8), torch.zeros(1, 8, 8, 8, dtype=torch.long))["loss"]
    assert loss.item() == 7


def test_weights_are_taken_from_a_file_that_fits_and_from_no_other(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = create_model("test_agunet")
    save_file(dict(source.state_dict()), tmp_path / "w.safetensors")
    task = SegmentationTask("test_agunet", (8, 8, 8), weights=str(tmp_path / "w.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(task.net.parameters(), source.parameters(), strict=True))
    with pytest.raises(ValueError, match="the file was written for other options"):
        SegmentationTask("test_agunet", (8, 8, 8), out_channels=3, weights=str(tmp_path / "w.safetensors"))


def test_voxels_with_the_ignored_label_do_not_reach_the_criterion() -> None:
    torch.manual_seed(0)
    task = SegmentationTask("test_agunet", (8, 8, 8), ignore=2).eval()
    image, label = torch.randn(1, 1, 8, 8, 8), torch.randint(0, 2, (1, 8, 8, 8))
    label[:, :4] = 2
    before = task.loss(image, label)["loss"]
    logits = task.net(image)
    expected = task.criterion(logits[:, :, 4:], label[:, 4:])
    assert torch.allclose(before, expected, atol=1e-5)
    assert task.loss(image, torch.full_like(label, 2))["loss"].item() == 0


def test_dice_counts_cases_without_foreground_apart() -> None:
    metric = Dice(["lesion"])
    rows = [{"hits": [0], "predicted": [p], "true": [0]} for p in (0, 0, 3)]
    rows.append({"hits": [4], "predicted": [4], "true": [4]})
    found = metric.compute_metrics(rows)
    assert found["dice"] == 0.5  # of the perfect case and the false alarm; two are right by staying empty
    assert found["empty_cases"] == 3
    assert found["empty_left_empty"] == pytest.approx(2 / 3)
    assert "empty_cases" not in metric.compute_metrics(rows[3:])
