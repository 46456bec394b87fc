"""One part of a split as a data set: a slide is read when it is asked for, and forgotten."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from medical_seg.slides.folder import open_slides
from medical_seg.slides.splits import make_split, read_split, split_of_table


class SlideBags(Dataset[dict[str, Any]]):
    """Slides of one part of a split. What is held is names and headers; features stay in their files.

    Args:
        data: files and folders of features.
        part: ``"train"``, ``"val"`` or ``"test"``.
        labels: the csv of labels; None as in `open_slides`.
        split: 1 to 5.
        splits: a file or folder of splits; None takes the table's own column, else `make_split`.
        merge: labels that become one class each.
        most: instances of a training bag at most, drawn anew each time; None takes all.

    Items: features (N, C) float32, label int.
    Raises: ValueError for data or splits that cannot be used; for a damaged file when it is read.
    """

    def __init__(
        self,
        data: str | Sequence[str],
        part: Literal["train", "val", "test"],
        *,
        labels: str | None = None,
        split: int = 1,
        splits: str | None = None,
        merge: Sequence[Sequence[str]] = (),
        most: int | None = None,
    ) -> None:
        if not data:
            raise ValueError("SlideBags: no slides given; use -d FOLDER")
        if part not in ("train", "val", "test"):
            raise ValueError(f"SlideBags: part must be 'train', 'val' or 'test', got part={part!r}")
        if most is not None and most < 1:
            raise ValueError(f"SlideBags: most must be at least 1, got most={most}")
        paths = [Path(path) for path in ([data] if isinstance(data, str) else data)]
        found = open_slides(paths, table=None if labels is None else Path(labels), merge=merge)
        if splits is not None:
            parts = read_split(Path(splits), found, split)
        else:
            parts = split_of_table(found) if found.parts else make_split(found, split)
        by_name = {slide.name: slide for slide in found.slides}
        self.slides = [by_name[name] for name in parts[part]]
        self.labels = [found.labels[slide.name] for slide in self.slides]
        self.most = most if part == "train" else None
        self.metainfo: dict[str, Any] = {"classes": found.classes, "in_channels": found.channels}

    def __len__(self) -> int:
        return len(self.slides)

    def __getitem__(self, index: int) -> dict[str, Any]:
        features = self.slides[index].features()
        if self.most is not None and len(features) > self.most:
            features = features[torch.randperm(len(features))[: self.most].sort().values]
        return {"features": features, "label": self.labels[index]}

    def place(self, index: int) -> tuple[str, np.ndarray | None, float | None]:
        """Name of a slide, upper left corners (N, 2) of its patches as X and Y, and their side."""
        slide = self.slides[index]
        return slide.name, slide.coordinates(), slide.side
