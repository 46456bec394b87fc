"""Digits pasted on larger canvases among specks: labels to learn from, boxes to be tested by."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from vision_models.data.digits import Digits

SIDE = 64
INK = 0.35  # of the brightness range: pixels above it belong to the digit's box


class PastedDigits(Dataset[dict[str, Any]]):
    """Each of scikit-learn's digits at a size and place of its own, on 64² pixels with noise and bright specks.

    Validation and test pictures are the same in every run; those of training are drawn anew each time.

    Args:
        split: of :class:`Digits`.
        smallest, largest: side of the square that a digit is enlarged to.
        specks: number of short strokes that belong to no digit.

    Shapes: image (1, 64, 64) float32 in [−1, 1]; boxes (1, 4), left, top, right, bottom in pixels, right and bottom
        exclusive, around the digit's ink.
    """

    def __init__(
        self,
        split: Literal["train", "val", "test"] = "train",
        *,
        smallest: int = 24,
        largest: int = 40,
        specks: int = 6,
    ) -> None:
        if not 8 <= smallest <= largest <= SIDE:
            raise ValueError(
                f"PastedDigits: 8 <= smallest <= largest <= {SIDE} must hold, got smallest={smallest} and "
                f"largest={largest}"
            )
        self.digits = Digits(split, size=8)
        self.split = split
        self.smallest = smallest
        self.largest = largest
        self.specks = specks
        self.metainfo: dict[str, Any] = {
            "classes": self.digits.metainfo["classes"],
            "preprocess": {"mode": "L", "size": [SIDE, SIDE], "mean": [0.5], "std": [0.5]},
        }

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # the test part is fixed; training draws from the generator that the engine seeds for each step
        generator = None if self.split == "train" else torch.Generator().manual_seed(index)
        ink = (self.digits.images[index] + 1) / 2

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (), generator=generator))

        side = draw(self.smallest, self.largest)
        top, left = draw(0, SIDE - side), draw(0, SIDE - side)
        canvas = 0.15 * torch.rand(1, SIDE, SIDE, generator=generator)
        for _ in range(self.specks):
            y, x, high, wide = draw(0, SIDE - 6), draw(0, SIDE - 6), draw(1, 5), draw(1, 5)
            canvas[:, y : y + high, x : x + wide] = 0.4 + 0.5 * torch.rand((), generator=generator)
        digit = F.interpolate(ink[None], (side, side), mode="bilinear")[0]
        window = (slice(None), slice(top, top + side), slice(left, left + side))
        canvas[window] = torch.maximum(canvas[window], digit)
        return {"image": 2 * canvas - 1, "label": self.digits.labels[index], "boxes": _box(digit[0], top, left)[None]}


def _box(ink: Tensor, top: int, left: int) -> Tensor:
    rows, columns = (ink > INK).any(1).nonzero()[:, 0], (ink > INK).any(0).nonzero()[:, 0]
    return torch.stack([columns[0] + left, rows[0] + top, columns[-1] + 1 + left, rows[-1] + 1 + top])
