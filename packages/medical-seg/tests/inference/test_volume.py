"""Whole volumes in bounded memory."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

from medical_seg.data.volumes import read_volume
from medical_seg.inference import volume as inference
from medical_seg.inference.budget import Budget, parse_memory
from medical_seg.inference.largest_parts import largest_parts
from medical_seg.inference.volume import segment_volume
from medical_seg.tasks.segmentation import SegmentationTask


class Cheap(nn.Module):
    """Three classes by two thresholds, and a dependence on the place in the window."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        ramp = torch.linspace(0, 0.3, x.shape[-1])
        return torch.cat([0.2 - x, ramp.expand_as(x), x - 0.5], 1)


def cheap_task() -> Any:
    task = SegmentationTask("test_agunet", (16, 16, 16), out_channels=3).eval()
    task.net = Cheap()
    return task


def test_less_memory_gives_the_same_labels_in_strips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(0).normal(size=(40, 96, 33)).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(image, np.diag([1, 1, 1.3, 1])), tmp_path / "i.nii.gz")
    volume = read_volume([tmp_path / "i.nii.gz"])
    heights: list[int] = []
    original = inference.logits_by_planes  # pyright: ignore[reportPrivateImportUsage]

    def watched(*arguments: Any, **options: Any) -> Any:
        heights.append(1 if options["rows"] is None else options["rows"][1] - options["rows"][0])
        return original(*arguments, **options)

    monkeypatch.setattr("medical_seg.inference.volume.logits_by_planes", watched)
    info = {"channels": ["x"], "spacing": (1.1, 1.2, 1.0), "scaling": ["zscore"]}
    whole = segment_volume(cheap_task(), volume, info)
    assert len(heights) == 1
    bytes_of_image = volume.data.nbytes
    bounded = segment_volume(cheap_task(), volume, info, budget=Budget(bytes_of_image + 1_200_000, base=0))
    assert len(heights) == 1 + 4
    assert np.array_equal(whole, bounded)
    with pytest.raises(ValueError, match=r"i\.nii\.gz: needs 0\.00 GiB, --max-mem allows 0\.00"):
        segment_volume(cheap_task(), volume, info, budget=Budget(bytes_of_image + 600_000, base=0))


def test_the_largest_part_of_each_class_stays() -> None:
    mask = np.zeros((1, 5, 9), np.uint8)
    mask[0, 0, :4] = 1
    mask[0, 4, 5:7] = 1
    mask[0, 2, 8] = 2
    assert np.unique(largest_parts(mask), return_counts=True)[1].tolist() == [40, 4, 1]


def test_sizes_of_memory_are_binary() -> None:
    assert parse_memory("1.5G") == 3 * 2**29
    assert parse_memory("800 MiB") == 800 * 2**20
