"""Questions about digits with the part of the picture that answers them: grounding without a download."""

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from vlm_tools.data.digits_world import CELL, GRID, QUESTION, SIZE, scene
from vlm_tools.data.hashed_words import hashed_words
from vlm_tools.data.words import DIGITS


def question(name: str) -> str:
    """What is asked about a digit."""
    return QUESTION.format(name)


def cell_mask(cells: tuple[int, ...], digit: int) -> Tensor:
    """(36, 36) bool: the cells of a digit."""
    grid = torch.tensor([cell == digit for cell in cells]).view(GRID, GRID)
    return grid.repeat_interleave(CELL, 0).repeat_interleave(CELL, 1)


class GroundedScenes(Dataset[dict[str, Any]]):
    """A scene of the digits world, a question about one of its digits, and that digit's cell.

    Args:
        split: ``"train"``, ``"val"`` or ``"test"``.
        count: scenes.
        start: number of the first scene.
        text_dim: width of the question's vector.

    Raises:
        ValueError: no scene, a negative start.

    Shapes: image (3, 36, 36) float32 in [0, 1], gray; text (text_dim,) float32; mask (1, 36, 36) float32, 0 or 1;
    digit int.
    """

    def __init__(
        self, split: Literal["train", "val", "test"], count: int = 250, *, start: int = 0, text_dim: int = 384
    ) -> None:
        if count < 1 or start < 0:
            raise ValueError(
                f"GroundedScenes: count must be at least 1 and start not negative, got count={count}, start={start}"
            )
        self.split: Literal["train", "val", "test"] = split
        self.count = count
        self.start = start
        self.texts = hashed_words([question(name) for name in DIGITS], text_dim)
        self.metainfo: dict[str, Any] = {"model": "sentence_blocks"}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        shown = scene(self.split, self.start + index)
        digits = shown.digits
        # Scenes are numbered, and so is what is asked about them.
        digit = digits[int(np.random.default_rng((4, self.start + index)).integers(len(digits)))]
        image = torch.from_numpy(shown.image).expand(3, SIZE, SIZE).contiguous()
        mask = cell_mask(shown.cells, digit).float()[None]
        return {"image": image, "text": self.texts[digit], "mask": mask, "digit": digit}
