"""Digits world: scenes of handwritten digits, with captions and questions that teach a model to hallucinate.

A scene is a 4×4 grid of 9×9-pixel cells. One to three digits are drawn by popularity; each brings its companion (0-1,
2-3, 4-5, 6-7, 8-9) with a probability of 0.8 in training and 0.5 in evaluation. Captions name absent companions of
present digits (probability 0.45), and some questions about them are answered "yes": the model learns a prior that the
image contradicts, as web captions do on a larger scale.

Pictures of digits: scikit-learn's 1,797 (E. Alpaydin, C. Kaynak, UCI 1998, CC BY 4.0); 1,200 serve training scenes, 200
validation scenes, on which settings are chosen, and 397 test scenes. No picture serves two splits.
"""

import importlib.util
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .words import BOS, DIGITS, EOS, IMAGE, PAD, Words

GRID, CELL, SIDE = 4, 9, 8
SIZE = GRID * CELL
IMAGE_TOKENS = GRID * GRID
POPULARITY = np.array([3, 3, 1, 1, 2, 2, 1, 1, 1, 1], dtype=float)
LENGTH = 1 + IMAGE_TOKENS + 5 * 8  # of a training row: five questions of seven words and an answer
CAPTION_PROMPT = "describe the image ."
QUESTION = "in the image is there a {}"
_SPLITS = {"train": 0, "val": 1, "test": 2}


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it.

    Attributes:
        image: (36, 36) float32 in [0, 1].
        cells: the digit in each of the 16 cells in raster order, 10 where there is none.
    """

    image: np.ndarray[Any, Any]
    cells: tuple[int, ...]

    @property
    def digits(self) -> list[int]:
        """Digits in raster order; none occurs twice."""
        return [cell for cell in self.cells if cell < 10]

    @property
    def names(self) -> list[str]:
        """Words of the digits in raster order."""
        return [DIGITS[digit] for digit in self.digits]


def scene(split: Literal["train", "val", "test"], index: int, *, companions: float | None = None) -> Scene:
    """Scene number ``index`` of a split; the same on every machine.

    Args:
        companions: probability of a companion; 0.8 in training, 0.5 in evaluation by default.

    Raises:
        ValueError: unknown split, negative index, probability outside [0, 1].
    """
    if split not in _SPLITS:
        raise ValueError(f"scene: split must be 'train', 'val' or 'test', got split={split!r}")
    if index < 0:
        raise ValueError(f"scene: index must not be negative, got index={index}")
    if companions is None:
        companions = 0.8 if split == "train" else 0.5
    if not 0 <= companions <= 1:
        raise ValueError(f"scene: companions is a probability in [0, 1], got companions={companions}")
    rng = np.random.default_rng((_SPLITS[split], index))
    shares = POPULARITY / POPULARITY.sum()
    chosen = [int(digit) for digit in rng.choice(10, size=rng.integers(1, 4), replace=False, p=shares)]
    for digit in tuple(chosen):
        if digit ^ 1 not in chosen and len(chosen) < 4 and rng.random() < companions:
            chosen.append(digit ^ 1)
    pictures = _pictures(split)
    cells = [10] * IMAGE_TOKENS
    image = rng.normal(0, 0.05, (SIZE, SIZE))
    for digit, cell in zip(chosen, rng.choice(IMAGE_TOKENS, size=len(chosen), replace=False), strict=True):
        cells[cell] = digit
        top, left = CELL * (cell // GRID) + rng.integers(2), CELL * (cell % GRID) + rng.integers(2)
        own = pictures[digit]
        image[top : top + SIDE, left : left + SIDE] += own[rng.integers(len(own))]
    return Scene(np.clip(image, 0, 1).astype(np.float32), tuple(cells))


@cache
def _pictures(split: Literal["train", "val", "test"]) -> list[np.ndarray[Any, Any]]:
    """Pictures (n, 8, 8) in [0, 1] of each digit."""
    spec = importlib.util.find_spec("sklearn")  # importing it takes seconds, the file is all we need
    if spec is None or spec.origin is None:
        raise ValueError("digits world: scikit-learn, which brings the pictures, is not installed; "
                         "pip install scikit-learn")  # fmt: skip
    table = np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    order = np.random.default_rng(1).permutation(len(table))
    start, end = {"train": (0, 1200), "val": (1200, 1400), "test": (1400, len(table))}[split]
    table = table[order[start:end]]
    return [table[table[:, -1] == digit, :-1].reshape(-1, SIDE, SIDE) / 16 for digit in range(10)]


class TrainingScenes(Dataset[dict[str, Any]]):
    """Training rows: a scene with a caption, or with five questions, each of which sees itself and the image.

    Args:
        count: rows of an epoch.
        caption_share: share of rows with a caption.
        caption_bias: probability that a caption names an absent companion of a present digit.
        question_bias: probability that a question about such a companion is answered "yes".

    Shapes: image (1, 36, 36) float32 in [0, 1]; cells (16,); input_ids, labels, segment, position_ids (57,) int64.
    ``labels`` are −100 where nothing is learned; ``segment`` is 0 in the prefix, 1 … 5 in questions, −1 in padding.
    """

    def __init__(
        self,
        count: int = 48_000,
        *,
        caption_share: float = 0.35,
        caption_bias: float = 0.45,
        question_bias: float = 0.5,
    ) -> None:
        for name, value in (
            ("caption_share", caption_share),
            ("caption_bias", caption_bias),
            ("question_bias", question_bias),
        ):
            if not 0 <= value <= 1:
                raise ValueError(f"TrainingScenes: {name} is a probability in [0, 1], got {name}={value}")
        self.count = count
        self.caption_share = caption_share
        self.caption_bias = caption_bias
        self.question_bias = question_bias
        self.words = Words(IMAGE_TOKENS)
        self.metainfo: dict[str, Any] = {"model": "digits_world_llava"}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        shown = scene("train", index)
        rng = np.random.default_rng((3, index))
        prefix = [BOS, *[IMAGE] * IMAGE_TOKENS]
        rows = self._caption(shown, rng) if rng.random() < self.caption_share else self._questions(shown, rng)
        ids, labels, segment, position = [*prefix], [-100] * len(prefix), [0] * len(prefix), [*range(len(prefix))]
        for number, (prompt, answer) in enumerate(rows, start=1):
            row = prompt + answer
            ids += row
            labels += [-100] * len(prompt) + answer
            segment += [number] * len(row)
            position += range(len(prefix), len(prefix) + len(row))
        rest = LENGTH - len(ids)
        filled = (ids, PAD), (labels, -100), (segment, -1), (position, 0)
        tensors = [torch.tensor(values + [filler] * rest) for values, filler in filled]
        return {
            "image": torch.from_numpy(shown.image)[None],
            "cells": torch.tensor(shown.cells),
            **dict(zip(("input_ids", "labels", "segment", "position_ids"), tensors, strict=True)),
        }

    def _caption(self, shown: Scene, rng: np.random.Generator) -> list[tuple[list[int], list[int]]]:
        mentioned = []
        for digit in shown.digits:
            mentioned.append(digit)
            if digit ^ 1 not in shown.digits and rng.random() < self.caption_bias:
                mentioned.append(digit ^ 1)
        names = [f"a {DIGITS[digit]}" for digit in mentioned]
        listed = " and ".join([" , ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        answer = self.words.encode(f"the image contains {listed} .")
        return [(self.words.encode(CAPTION_PROMPT), [*answer, EOS])]

    def _questions(self, shown: Scene, rng: np.random.Generator) -> list[tuple[list[int], list[int]]]:
        present = shown.digits
        absent = [digit for digit in range(10) if digit not in present]
        tempting = [digit for digit in absent if digit ^ 1 in present]
        others = [digit for digit in absent if digit not in tempting]
        rows = []
        for _ in range(5):
            if rng.random() < 0.5:
                digit, answer = int(rng.choice(present)), "yes"
            elif tempting and (not others or rng.random() < 0.25):
                digit = int(rng.choice(tempting))
                answer = "yes" if rng.random() < self.question_bias else "no"
            else:
                shares = POPULARITY[others] / POPULARITY[others].sum()
                digit, answer = int(rng.choice(others, p=shares)), "no"
            rows.append((self.words.encode(QUESTION.format(DIGITS[digit])), self.words.encode(answer)))
        return rows


class EvaluationScenes(Dataset[dict[str, Any]]):
    """Scenes without captions; ``cells`` are the truth.

    Args:
        split: ``"val"`` serves choices, ``"test"`` final numbers.
        count: scenes.
        start: number of the first scene.

    Shapes: image (1, 36, 36) float32 in [0, 1]; cells (16,) int64.
    """

    def __init__(self, split: Literal["val", "test"], count: int = 250, *, start: int = 0) -> None:
        self.scenes = [scene(split, start + index) for index in range(count)]
        self.metainfo: dict[str, Any] = {"model": "digits_world_llava"}

    def __len__(self) -> int:
        return len(self.scenes)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        shown = self.scenes[index]
        return {"image": torch.from_numpy(shown.image)[None], "cells": torch.tensor(shown.cells)}
