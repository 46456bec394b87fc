"""Training and evaluation transforms on torchvision's tv_tensors: pictures and their boxes together.

Source of the scales: DETR's recipe, as in https://github.com/impiga/Plain-DETR, ``datasets/coco.py``. Checked in:
``data/test_coco.py``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F


class DetectionTransform:
    """Resize, and for training flip, crop and change colors.

    Args:
        short_sides: the short side is resized to one of these pixel counts, drawn at random if ``augment``, else the
            last; empty keeps the size.
        max_size: upper limit of the long side.
        augment: flip, crop and color; without it only the resizing happens.
        flip: probability of a horizontal flip; 0 for digits and letters.
        crop: in half of the pictures resize to 400, 500 or 600, cut out 384–600 pixels, then resize (DETR).
        iou_crop: cut out random parts that overlap with an object (SSD), with this probability.
        color: strength of changes in brightness, contrast, saturation (and a quarter of it in hue).

    Raises: ValueError if a number is out of range.
    """

    def __init__(
        self,
        *,
        short_sides: Sequence[int] = (800,),
        max_size: int = 1333,
        augment: bool = False,
        flip: float = 0.5,
        crop: bool = False,
        iou_crop: float = 0.0,
        color: float = 0.0,
    ) -> None:
        for name, value in (("flip", flip), ("iou_crop", iou_crop), ("color", color)):
            if not 0 <= value <= 1:
                raise ValueError(f"DetectionTransform: {name} must be in [0, 1], got {name}={value}")
        if any(side < 1 for side in short_sides) or (short_sides and max_size < max(short_sides)):
            raise ValueError(
                f"DetectionTransform: short_sides={tuple(short_sides)} must be positive and at most max_size={max_size}"
            )
        self.short_sides = tuple(short_sides)
        self.max_size = max_size
        self.crop = crop and augment
        steps: list[Any] = []
        if augment and color:
            steps.append(v2.ColorJitter(color, color, color, color / 4))
        if augment and iou_crop:
            steps.append(v2.RandomApply([v2.RandomIoUCrop()], p=iou_crop))
        if augment and flip:
            steps.append(v2.RandomHorizontalFlip(flip))
        self.first = v2.Compose(steps) if steps else None
        self.choose = augment
        # Cut-off slivers must go, else they would be trained on; sizes are checked in pixels of the result.
        self.clean = v2.SanitizeBoundingBoxes(min_size=1.0)

    def __call__(self, image: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(3, Y, X) uint8, (N, 4) xyxy, (N,) → (3, Y', X') float32 in [0, 1], (M, 4), (M,) with M ≤ N."""
        height, width = image.shape[-2:]
        sample: Any = {
            "image": tv_tensors.Image(image),
            "boxes": tv_tensors.BoundingBoxes(boxes.float(), format="XYXY", canvas_size=(height, width)),  # pyright: ignore[reportCallIssue]
            "labels": labels,
        }
        if self.first is not None:
            sample = self.first(sample)
        if self.crop and torch.rand(()) < 0.5:
            sample = self._crop(sample)
        if self.short_sides:
            sample = self._resize(sample, self.short_sides, self.max_size)
        sample = self.clean(sample)
        pixels = F.to_dtype(sample["image"], torch.float32, scale=True)
        return pixels.as_subclass(Tensor), sample["boxes"].as_subclass(Tensor), sample["labels"]

    def _resize(self, sample: Any, sides: Sequence[int], limit: int | None) -> Any:
        side = sides[int(torch.randint(len(sides), ()))] if self.choose else sides[-1]
        short, long = sorted(sample["image"].shape[-2:])
        scale = side / short if limit is None else min(side / short, limit / long)
        size = [max(1, round(edge * scale)) for edge in sample["image"].shape[-2:]]
        return v2.Resize(size, antialias=True)(sample)

    def _crop(self, sample: Any) -> Any:
        sample = self._resize(sample, (400, 500, 600), None)
        height, width = sample["image"].shape[-2:]
        rows = int(torch.randint(min(height, 384), min(height, 600) + 1, ()))
        columns = int(torch.randint(min(width, 384), min(width, 600) + 1, ()))
        top = int(torch.randint(height - rows + 1, ()))
        left = int(torch.randint(width - columns + 1, ()))
        return {
            "image": F.crop(sample["image"], top, left, rows, columns),
            "boxes": F.clamp_bounding_boxes(F.crop(sample["boxes"], top, left, rows, columns)),
            "labels": sample["labels"],
        }
