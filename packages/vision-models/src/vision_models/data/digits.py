"""Scikit-learn's 1,797 handwritten digits, 8×8 pixels in 17 grey levels: the data that every installation has.

Source: E. Alpaydin, C. Kaynak, Optical Recognition of Handwritten Digits, UCI 1998 (CC BY 4.0), its test part.
"""

import hashlib
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from vision_models.data.corruptions import CORRUPTIONS
from vision_models.data.splits import stratified_parts

SIDE = 8
LEVELS = 16
PIXEL = 2 / SIDE  # of the original, in the coordinates of grid_sample
KNOTS = 4  # of the random displacements, per axis
DATA_SHA256 = "87ff0c9e40dc7e2c0e34e7257799c2e3f3aec1a016363bb11cad869ec428a826"


class Digits(Dataset[dict[str, Any]]):
    """One of three fixed, stratified parts: 1,259 train, 179 val, 359 test images.

    Args:
        split: ``"val"`` serves every choice, ``"test"`` the final number only.
        size: side that images are enlarged to, bilinearly.
        augment: random rotation (±``degrees``), shift (±``shift`` original pixels), scale (±``scale``) and shear,
            smooth displacements (``elastic`` original pixels) and stroke weight (ink^(e^±``contrast``)).
        limit: take only so many images, a tenth of each digit, always the same ones; a larger limit adds to them.
        corruptions: ``"noise"``, ``"blur"`` or ``"contrast"``: the images as they are, then all of them once more under
            each; items then have its number as ``corruption``, 0 for images as they are.

    Shapes: image (1, size, size) float32 in [−1, 1].
    Raises: ValueError if the installed data are not the ones that results were measured on, or have no such ``limit``.
    """

    def __init__(
        self,
        split: Literal["train", "val", "test"] = "train",
        *,
        size: int = 32,
        augment: bool = False,
        degrees: float = 8.0,
        shift: float = 0.5,
        scale: float = 0.08,
        shear: float = 0.1,
        elastic: float = 0.3,
        contrast: float = 0.3,
        limit: int | None = None,
        corruptions: Sequence[str] = (),
    ) -> None:
        if split not in ("train", "val", "test"):
            raise ValueError(f"Digits: split must be 'train', 'val' or 'test', got split={split!r}")
        images, labels = _load()
        test, val, train = stratified_parts(labels, (0.2, 0.1), salt="digits")
        index = {"train": train, "val": val, "test": test}[split]
        if limit is not None:
            index = index[_few(labels[index], limit)]
        self.images = torch.from_numpy(images[index]).float().div(LEVELS / 2).sub(1).unsqueeze(1)
        self.labels: list[int] = labels[index].tolist()
        unknown = [name for name in corruptions if name not in CORRUPTIONS]
        if unknown:
            raise ValueError(f"Digits: corruptions must be among {sorted(CORRUPTIONS)}, got {unknown[0]!r}")
        self.kinds: list[int] = []
        if corruptions:
            large = F.interpolate(self.images, (size, size), mode="bilinear", align_corners=False)
            self.images = torch.cat([large, *(CORRUPTIONS[name](large) for name in corruptions)])
            self.kinds = [kind for kind in range(1 + len(corruptions)) for _ in self.labels]
            self.labels = self.labels * (1 + len(corruptions))
        self.size = size
        self.augment = augment
        self.degrees = degrees
        self.shift = shift
        self.scale = scale
        self.shear = shear
        self.elastic = elastic
        self.contrast = contrast
        # bicubic interpolation along one axis: displacements at a few knots → at every pixel
        knots = torch.eye(KNOTS)[None, None]
        self.smooth = F.interpolate(knots, (size, KNOTS), mode="bicubic", align_corners=True)[0, 0]
        self.metainfo: dict[str, Any] = {
            "classes": [str(digit) for digit in range(10)],
            "preprocess": {"mode": "L", "size": [size, size], "through": [SIDE, SIDE], "mean": [0.5], "std": [0.5]},
        }

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Items of a batch at once, as ``DataLoader`` asks for them: warping 64 images costs little more than one."""
        images = self.images[indices]
        images = F.interpolate(images, (self.size, self.size), mode="bilinear", align_corners=False)
        if self.augment:
            images = self._warped(images)
        items = [{"image": image, "label": self.labels[i]} for image, i in zip(images, indices, strict=True)]
        if self.kinds:
            items = [{**item, "corruption": self.kinds[i]} for item, i in zip(items, indices, strict=True)]
        return items

    def _warped(self, images: Tensor) -> Tensor:
        """Sample (B, 1, size, size) at randomly displaced positions; outside is background.

        They are enlarged before: warping 8×8 pixels would fade strokes at the border as never happens in evaluation.
        """
        count = len(images)
        grid = F.affine_grid(self._random_maps(count), list(images.shape), align_corners=False)
        if self.elastic > 0:
            knots = torch.randn(count, 2, KNOTS, KNOTS) * (self.elastic * PIXEL)
            grid = grid + torch.einsum("yk,bckl,xl->byxc", self.smooth, knots, self.smooth)
        ink = F.grid_sample((images + 1) / 2, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        if self.contrast > 0:
            ink = ink ** torch.exp(self.contrast * (2 * torch.rand(count, 1, 1, 1) - 1))
        return 2 * ink - 1

    def _random_maps(self, count: int) -> Tensor:
        """Random affine maps (count, 2, 3) from output to input coordinates, both in [−1, 1]."""
        u = torch.rand(6, count) * 2 - 1
        angle = math.radians(self.degrees) * u[0]
        cos, sin = angle.cos(), angle.sin()
        zoom_y, zoom_x, shear = 1 + self.scale * u[1], 1 + self.scale * u[2], self.shear * u[3]
        shift_x, shift_y = self.shift * PIXEL * u[4], self.shift * PIXEL * u[5]
        x_row = torch.stack([zoom_x * cos, zoom_x * (shear * cos - sin), shift_x], dim=1)
        y_row = torch.stack([zoom_y * sin, zoom_y * (shear * sin + cos), shift_y], dim=1)
        return torch.stack([x_row, y_row], dim=1)


def _few(labels: np.ndarray, limit: int) -> np.ndarray:
    """Places of ``limit`` labels, a tenth of each digit."""
    each = limit // 10
    most = int(np.bincount(labels).min()) - 1
    if limit % 10 or not 0 < each <= most:
        raise ValueError(f"Digits: limit must be a multiple of 10 up to {10 * most}, got limit={limit}")
    return stratified_parts(labels, (0.0,), salt="few digits", at_least=each)[0]


def _load() -> tuple[np.ndarray, np.ndarray]:
    # scikit-learn is found, not imported: its file is all we need, and the import takes seconds.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ValueError("Digits: scikit-learn, which brings the data, is not installed; pip install scikit-learn")
    table = np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",", dtype=np.int64)
    images, labels = table[:, :-1].reshape(-1, SIDE, SIDE).astype(np.uint8), table[:, -1]
    digest = hashlib.sha256(images.tobytes() + labels.astype(np.uint8).tobytes()).hexdigest()
    if digest != DATA_SHA256:
        raise ValueError(
            f"Digits: scikit-learn's digits have SHA-256 {digest[:12]}…, expected {DATA_SHA256[:12]}…; "
            "reinstall scikit-learn"
        )
    return images, labels
