"""``digits_coco``: scikit-learn's handwritten digits on scikit-image's photographs; 800 train, 200 val, 200 test.

128×128 RGB pictures with 1–12 digits of 12–48 pixels in random colors, made again bit for bit on every machine and
checked by SHA-256. Splits share neither glyphs nor photographs. Every eighth picture is crowded: small, overlapping.

Sources: E. Alpaydin, C. Kaynak, UCI 1998 (CC BY 4.0); photographs as listed in scikit-image's data (public domain or
free licences). Checked in: ``data/test_coco.py``.
"""

import hashlib
import importlib.util
import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from detection.data.transforms import DetectionTransform

SIDE = 128
# Glyphs [low, high), pictures, first seed, photographs, SHA-256 of annotations, of pixels.
SPLITS: dict[str, tuple[int, int, int, int, tuple[str, ...], str, str]] = {
    "train": (0, 1200, 800, 1000, ("astronaut", "coffee"), "700f3a0627382257", "1e54addc33237600"),
    "val": (1200, 1500, 200, 2000, ("chelsea",), "60dd72d7e7bf1a87", "2dfd608d8eb97608"),
    "test": (1500, 1797, 200, 3000, ("camera",), "804e7359302e7a98", "c4c0b237c3f96c37"),
}
Picture = tuple[np.ndarray, list[tuple[int, int, int, int]], list[int]]


class DigitsCoco(Dataset[dict[str, Any]]):
    """One split, as items of `detection.data.collate_detection`.

    Args:
        split: ``"val"`` serves every choice, ``"test"`` the final number only.
        transform: options of `DetectionTransform`; by default pictures stay as they are.
        limit: use only the first pictures.

    Raises: ValueError for an unknown split, or if the installed data are not those that results were measured on.
    """

    def __init__(
        self,
        split: Literal["train", "val", "test"] = "train",
        *,
        transform: dict[str, Any] | None = None,
        limit: int | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ValueError(f"DigitsCoco: split must be 'train', 'val' or 'test', got split={split!r}")
        options = {"short_sides": (), **(transform or {})}
        self.pictures = pictures(split)[:limit]
        self.transform = DetectionTransform(**options)
        evaluation = {key: list(options[key]) if key == "short_sides" else options[key]
                      for key in ("short_sides", "max_size") if key in options}  # fmt: skip
        self.metainfo: dict[str, Any] = {
            "classes": [str(digit) for digit in range(10)],
            "category_ids": list(range(1, 11)),
            "preprocess": evaluation,
        }

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        pixels, boxes, labels = self.pictures[index]
        image, moved, kept = self.transform(
            torch.from_numpy(pixels).permute(2, 0, 1),
            torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
            torch.tensor(labels),
        )
        return {
            "image": image,
            "boxes": moved,
            "labels": kept,
            "image_id": index + 1,
            "original_size": (SIDE, SIDE),
            "annotations": [
                {"bbox": [x0, y0, x1 - x0, y1 - y0], "category_id": label, "area": (x1 - x0) * (y1 - y0), "iscrowd": 0}
                for (x0, y0, x1, y1), label in zip(boxes, labels, strict=True)
            ],
        }


def write_coco(root: Path, split: Literal["train", "val", "test"], *, limit: int | None = None) -> Path:
    """Write a split as ``root/<split>/*.png`` and ``_annotations.coco.json``, to be read by any COCO tool.

    Args:
        limit: write only the first pictures.
    """
    from PIL import Image

    folder = root / split
    folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index, (pixels, boxes, labels) in enumerate(pictures(split)[:limit]):
        name = f"{index:04d}.png"
        Image.fromarray(pixels).save(folder / name)
        images.append({"id": index + 1, "file_name": name, "width": SIDE, "height": SIDE})
        for (x0, y0, x1, y1), label in zip(boxes, labels, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": label + 1,
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "area": (x1 - x0) * (y1 - y0),
                    "iscrowd": 0,
                    "segmentation": [[x0, y0, x1, y0, x1, y1, x0, y1]],
                }
            )
    categories = [{"id": digit + 1, "name": str(digit)} for digit in range(10)]
    path = folder / "_annotations.coco.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return path


@lru_cache(maxsize=3)
def pictures(split: str) -> list[Picture]:
    """All pictures of a split: (128, 128, 3) uint8, boxes xyxy with exclusive ends, digits.

    Raises: ValueError if scikit-learn or scikit-image is missing or brings other data.
    """
    low, high, count, seed, photographs, annotation_hash, pixel_hash = SPLITS[split]
    glyphs, labels = load_glyphs()
    backgrounds = [_photograph(name) for name in photographs]
    made = [_compose(np.random.RandomState(seed + k), k, glyphs, labels, low, high, backgrounds) for k in range(count)]
    about, pixels = hashlib.sha256(), hashlib.sha256()
    for image, boxes, digits in made:
        about.update(json.dumps([boxes, digits]).encode())
        pixels.update(image.tobytes())
    for what, found, expected in (
        ("annotations", about.hexdigest(), annotation_hash),
        ("pixels", pixels.hexdigest(), pixel_hash),
    ):
        if not found.startswith(expected):
            raise ValueError(f"DigitsCoco: SHA-256 of the {what} of {split} is {found[:16]}, expected {expected}; "
                             "reinstall scikit-learn and scikit-image")  # fmt: skip
    return made


def _compose(
    draw: np.random.RandomState,
    k: int,
    glyphs: np.ndarray,
    labels: np.ndarray,
    low: int,
    high: int,
    backgrounds: list[np.ndarray],
) -> Picture:
    photograph = backgrounds[draw.randint(len(backgrounds))]
    y, x = (draw.randint(photograph.shape[0] - SIDE + 1), draw.randint(photograph.shape[1] - SIDE + 1))
    image = photograph[y : y + SIDE, x : x + SIDE].astype(np.float64)
    if draw.randint(2):
        image = image[:, ::-1].copy()
    crowded = k % 8 == 7
    count = draw.randint(8, 13) if crowded else draw.randint(1, 7)
    smallest, largest, limit = (12, 21, 0.5) if crowded else (16, 49, 0.3)
    boxes: list[tuple[int, int, int, int]] = []
    digits: list[int] = []
    for _ in range(count):
        glyph = low + draw.randint(high - low)
        for _ in range(20):
            size = draw.randint(smallest, largest)
            top, left = draw.randint(SIDE + 1 - size), draw.randint(SIDE + 1 - size)
            ink = enlarged(glyphs[glyph] / 16.0, size)
            rows, columns = np.nonzero((ink >= 0.25).any(1))[0], np.nonzero((ink >= 0.25).any(0))[0]
            box = (
                int(left + columns[0]),
                int(top + rows[0]),
                int(left + columns[-1] + 1),
                int(top + rows[-1] + 1),
            )
            if all(_iou(box, other) <= limit for other in boxes):
                break
        else:
            continue
        region = image[top : top + size, left : left + size]
        color = draw.randint(0, 256, 3).astype(np.float64)
        if abs(color.mean() - region.mean()) < 80:
            color = np.full(3, 255.0 if region.mean() < 128 else 0.0)
        image[top : top + size, left : left + size] = region * (1 - ink[..., None]) + color * ink[..., None]
        boxes.append(box)
        digits.append(int(labels[glyph]))
    return np.clip(np.floor(image + 0.5), 0, 255).astype(np.uint8), boxes, digits


def enlarged(glyph: np.ndarray, size: int) -> np.ndarray:
    """Bilinear, half-pixel centers, clamped edges.

    Rows before columns and weights in this form: a pixel of exactly 0.25 ink may otherwise fall out of its box.
    """
    last = len(glyph) - 1
    position = np.clip((np.arange(size) + 0.5) * len(glyph) / size - 0.5, 0, last)
    low = np.floor(position).astype(int)
    high = np.minimum(low + 1, last)
    share = position - low
    rows = glyph[low] * (1 - share)[:, None] + glyph[high] * share[:, None]
    return rows[:, low] * (1 - share) + rows[:, high] * share


def _iou(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    overlap = max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    return overlap / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - overlap)


def load_glyphs() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits, (1797, 8, 8) uint8 in 0 … 16, and which they are.

    Raises: ValueError if scikit-learn is missing.
    """
    # scikit-learn is found, not imported: its file is all we need, and the import takes seconds.
    spec = importlib.util.find_spec("sklearn")
    if spec is None or spec.origin is None:
        raise ValueError(
            "DigitsCoco: scikit-learn, which brings the digits, is not installed; pip install scikit-learn"
        )
    table = np.loadtxt(Path(spec.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",", dtype=np.int64)
    return table[:, :-1].reshape(-1, 8, 8).astype(np.uint8), table[:, -1]


def _photograph(name: str) -> np.ndarray:
    if importlib.util.find_spec("skimage") is None:
        raise ValueError("DigitsCoco: scikit-image, which brings the photographs, is not installed; "
                         "pip install scikit-image")  # fmt: skip
    from skimage import data

    load: Callable[[], np.ndarray] = getattr(data, name)
    image = load()
    return image if image.ndim == 3 else np.repeat(image[..., None], 3, axis=2)
