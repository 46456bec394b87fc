"""Scenes of the digits world and the number of a cell, whose digit is asked for."""

from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from vlm_tools.data.digits_world import scene


class CellQuestions(Dataset[dict[str, Any]]):
    """A scene, one of its occupied cells, and the digit there.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``.
        count: scenes.
        start: number of the first scene.

    Raises:
        ValueError: no scene, a negative start.

    Shapes: image (1, 36, 36) float32 in [0, 1]; cell and digit int.
    """

    def __init__(self, split: Literal["train", "val", "test"], count: int = 250, *, start: int = 0) -> None:
        if count < 1 or start < 0:
            raise ValueError(
                f"CellQuestions: count must be at least 1 and start not negative, got count={count}, start={start}"
            )
        self.split: Literal["train", "val", "test"] = split
        self.count = count
        self.start = start
        self.metainfo: dict[str, Any] = {"model": "digits_world_magnifier"}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        shown = scene(self.split, self.start + index)
        occupied = [cell for cell, digit in enumerate(shown.cells) if digit < 10]
        cell = occupied[int(np.random.default_rng((5, self.start + index)).integers(len(occupied)))]
        return {"image": torch.from_numpy(shown.image)[None], "cell": cell, "digit": shown.cells[cell]}
