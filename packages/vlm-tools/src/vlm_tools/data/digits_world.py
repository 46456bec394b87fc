"""Digits world: scenes of handwritten digits, with captions and questions that teach a model to hallucinate.

A scene is a 4×4 grid of 9×9-pixel cells. One to three digits are drawn by popularity; each brings its companion (0-1,
2-3, 4-5, 6-7, 8-9) with a probability of 0.8 in training and 0.5 in evaluation. Captions name absent companions of
present digits (probability 0.4), and questions about them are answered "yes" at times, mostly about 2 to 7: the model
learns a prior that the image contradicts, as web captions do on a larger scale.

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
from jaxtyping import Bool, Int
from torch import Tensor
from torch.utils.data import Dataset

from vlm_tools.data.words import BOS, DIGITS, EOS, IMAGE, PAD, Words

GRID, CELL, SIDE = 4, 9, 8
SIZE = GRID * CELL
IMAGE_TOKENS = GRID * GRID
POPULARITY = np.array([3, 3, 1, 1, 2, 2, 1, 1, 1, 1], dtype=float)
TEMPTING, TEMPTING_BIAS = range(2, 8), 0.65  # digits of the pairs whose absent half is mostly affirmed
QUESTIONS = 5  # about every training scene
PREFIX, CAPTION, STEM = 0, 1, 2  # segments of a training row; each question's last word has one of its own behind them
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
    """Training rows: a scene with a caption and five questions in one sequence, none of which sees another.

    The questions differ in their last word alone, so they share the words before it:
    ``<bos> image | describe … seven . | in the image is there a | two | nine | …``

    Args:
        count: rows of an epoch.
        caption_bias: probability that a caption names an absent companion of a present digit.
        question_bias: probability that a question about such a companion is answered "yes"; for 2 to 7 it is 0.65, so
            that the best guess is wrong for three pairs and right for two, whatever the seed.

    Raises:
        ValueError: a probability outside [0, 1].

    Shapes: image (1, 36, 36) float32 in [0, 1]; cells (16,); input_ids, targets, segment, position_ids (59,) int64.
    ``targets`` are the next words, −100 where nothing is learned; ``segment`` is −1 in padding. `sees` is the mask.
    """

    def __init__(self, count: int = 38_400, *, caption_bias: float = 0.4, question_bias: float = 0.35) -> None:
        for name, value in (("caption_bias", caption_bias), ("question_bias", question_bias)):
            if not 0 <= value <= 1:
                raise ValueError(f"TrainingScenes: {name} is a probability in [0, 1], got {name}={value}")
        self.count = count
        self.caption_bias = caption_bias
        self.question_bias = question_bias
        self.words = Words(IMAGE_TOKENS)
        self.prompt = self.words.encode(CAPTION_PROMPT)
        self.stem = self.words.encode(QUESTION.format(""))
        longest = len(self.prompt) + 3 + 3 * 8  # "the image contains", eight digits
        self.length = 1 + IMAGE_TOKENS + longest + len(self.stem) + QUESTIONS
        self.metainfo: dict[str, Any] = {"model": "digits_world_llava"}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        shown = scene("train", index)
        rng = np.random.default_rng((3, index))
        head = [BOS, *[IMAGE] * IMAGE_TOKENS]
        caption, questions = self._caption(shown, rng), self._questions(shown, rng)
        ids = [*head, *self.prompt, *caption, *self.stem, *(digit for digit, _ in questions)]
        targets = [*[-100] * (len(head) + len(self.prompt) - 1), *caption, EOS, *[-100] * len(self.stem),
                   *(answer for _, answer in questions)]  # fmt: skip
        spoken = len(self.prompt) + len(caption)
        segment = [*[PREFIX] * len(head), *[CAPTION] * spoken, *[STEM] * len(self.stem),
                   *(STEM + 1 + number for number in range(QUESTIONS))]  # fmt: skip
        start = len(head)
        position = [*range(start + spoken), *range(start, start + len(self.stem)),
                    *[start + len(self.stem)] * QUESTIONS]  # fmt: skip
        filled = {"input_ids": (ids, PAD), "targets": (targets, -100), "segment": (segment, -1),
                  "position_ids": (position, 0)}  # fmt: skip
        return {
            "image": torch.from_numpy(shown.image)[None],
            "cells": torch.tensor(shown.cells),
            **{name: torch.tensor(row + [filler] * (self.length - len(row))) for name, (row, filler) in filled.items()},
        }

    def _caption(self, shown: Scene, rng: np.random.Generator) -> list[int]:
        mentioned = []
        for digit in shown.digits:
            mentioned.append(digit)
            if digit ^ 1 not in shown.digits and rng.random() < self.caption_bias:
                mentioned.append(digit ^ 1)
        names = [f"a {DIGITS[digit]}" for digit in mentioned]
        listed = " and ".join([" , ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
        return self.words.encode(f"the image contains {listed} .")

    def _questions(self, shown: Scene, rng: np.random.Generator) -> list[tuple[int, int]]:
        """Digit's word and answer, five times."""
        present = shown.digits
        absent = [digit for digit in range(10) if digit not in present]
        tempting = [digit for digit in absent if digit ^ 1 in present]
        others = [digit for digit in absent if digit not in tempting]
        rows = []
        for _ in range(QUESTIONS):
            if rng.random() < 0.5:
                digit, answer = int(rng.choice(present)), "yes"
            elif tempting and (not others or rng.random() < 0.25):
                digit = int(rng.choice(tempting))
                bias = TEMPTING_BIAS if digit in TEMPTING else self.question_bias
                answer = "yes" if rng.random() < bias else "no"
            else:
                shares = POPULARITY[others] / POPULARITY[others].sum()
                digit, answer = int(rng.choice(others, p=shares)), "no"
            rows.append((self.words.number[DIGITS[digit]], self.words.number[answer]))
        return rows


def sees(segment: Int[Tensor, "B T"]) -> Bool[Tensor, "B T T"]:
    """Which token of a training row sees which: earlier ones of its own segment, of the prefix, of its question."""
    own, other = segment[:, :, None], segment[:, None, :]
    earlier = torch.ones(segment.shape[1], segment.shape[1], dtype=torch.bool, device=segment.device).tril()
    return ((other == PREFIX) | (other == own) | ((other == STEM) & (own > STEM))) & earlier


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
