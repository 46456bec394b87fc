"""COCO json and its pictures: validated once, with everything wrong named, repaired or refused.

Repaired, with one line in the log: annotation ids that do not start at 1 or repeat (pycocotools silently loses the
match of id 0), boxes that reach over the border (cut off), boxes without area (left out). Refused: json that is
none, no pictures or categories, unknown ids, repeated picture ids, missing files. Category ids may have gaps.

Format: Lin et al., Microsoft COCO, ECCV 2014; https://cocodataset.org/#format-data. Checked in: ``data/test_coco.py``.
"""

import json
import logging
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from detection.data.transforms import DetectionTransform

logger = logging.getLogger(__name__)

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


def read_image(path: Path) -> Tensor:
    """An upright picture as (3, Y, X) uint8.

    Raises: ValueError if the file is missing, empty, no picture or damaged; the message names it.
    """
    try:
        with Image.open(path) as opened:
            opened.load()  # a truncated file must fail here, under its own name
            image = ImageOps.exif_transpose(opened)
            if image.mode.startswith("I;16") or image.mode in ("I", "F"):
                image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
            return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).contiguous()
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image, or of an unknown format") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, FileNotFoundError | IsADirectoryError | PermissionError):
            raise ValueError(f"{path}: {error.strerror}") from None
        raise ValueError(f"{path}: the image is damaged: {error}") from None


@dataclass(frozen=True)
class AnnotatedPicture:
    """A picture of a COCO json.

    Attributes:
        image_id: As in the json.
        path: Of the file.
        annotations: COCO records ``bbox`` (x, y, width, height), ``category_id``, ``area``, ``iscrowd``.
    """

    image_id: int
    path: Path
    annotations: tuple[dict[str, Any], ...]


def read_coco(path: Path, folder: Path) -> tuple[list[AnnotatedPicture], dict[int, str]]:
    """Pictures with their annotations, and category id → name in the order of the ids.

    Raises: ValueError naming the file and the first offending records.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a json file: {error}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path}: not a COCO file, it has no list {key!r}")
    if not content["images"]:
        raise ValueError(f"{path}: the list of images is empty")
    if not content["categories"]:
        raise ValueError(f"{path}: the list of categories is empty, there is nothing to detect")
    try:
        names = {int(entry["id"]): str(entry["name"]) for entry in content["categories"]}
        sizes = {int(i["id"]): (i.get("width", math.inf), i.get("height", math.inf)) for i in content["images"]}
        files = {int(entry["id"]): folder / str(entry["file_name"]) for entry in content["images"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: an image or category lacks id, name or file_name: {error!r}") from None
    if len(sizes) != len(content["images"]):
        raise ValueError(f"{path}: {len(content['images']) - len(sizes)} image ids appear more than once")
    missing = [str(file) for file in files.values() if not file.is_file()]
    if missing:
        raise ValueError(f"{path}: {len(missing)} of {len(files)} image files are missing: {_some(missing)}")
    kept: dict[int, list[dict[str, Any]]] = defaultdict(list)
    cut = empty = 0
    for position, record in enumerate(content["annotations"]):
        try:
            image_id, category = int(record["image_id"]), int(record["category_id"])
            x, y, w, h = (float(value) for value in record["bbox"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: annotation {position} lacks image_id, category_id or bbox: {error!r}") from None
        if image_id not in sizes:
            raise ValueError(f"{path}: annotation {position} belongs to image_id={image_id}, which is not in the list")
        if category not in names:
            raise ValueError(f"{path}: annotation {position} has category_id={category}, which is not in the list")
        if not all(math.isfinite(value) for value in (x, y, w, h)):
            raise ValueError(f"{path}: annotation {position} has the box {record['bbox']}")
        width, height = sizes[image_id]
        x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
        if x1 <= x0 or y1 <= y0:
            empty += 1
            continue
        # A quarter of a pixel over the border is rounding and stays, for equal numbers with other tools.
        if max(x0 - x, y0 - y, x + w - x1, y + h - y1) > 0.25:
            cut += 1
            x, y, w, h = x0, y0, x1 - x0, y1 - y0
        kept[image_id].append(
            {
                "bbox": [x, y, w, h],
                "category_id": category,
                "area": float(record.get("area", w * h)),
                "iscrowd": int(record.get("iscrowd", 0)),
            }
        )
    ids = [record.get("id") for record in content["annotations"]]
    notes = [
        f"{cut} boxes reached over the border and were cut off" if cut else "",
        f"{empty} boxes without area inside the image were left out" if empty else "",
        "annotation ids were missing, 0 or repeated and were numbered anew"
        if 0 in ids or len({*ids}) < len(ids)
        else "",
    ]
    if any(notes):
        logger.warning("%s: %s", path, "; ".join(note for note in notes if note))
    return [AnnotatedPicture(i, file, tuple(kept[i])) for i, file in files.items()], dict(sorted(names.items()))


def find_split(root: Path, split: str) -> tuple[Path, Path]:
    """Annotation file and image folder of ``root/<split>/_annotations.coco.json`` or of COCO's own layout.

    Raises: ValueError if neither is there.
    """
    for name in (split, "valid") if split == "val" else (split,):
        if (root / name / "_annotations.coco.json").is_file():
            return root / name / "_annotations.coco.json", root / name
    for year in ("2017", "2014", ""):
        path = root / "annotations" / f"instances_{split}{year}.json"
        if path.is_file():
            return path, root / f"{split}{year}"
    raise ValueError(
        f"CocoDetection: {root} holds neither {split}/_annotations.coco.json nor "
        f"annotations/instances_{split}2017.json; set data_root in the recipe, or --set data_root=..."
    )


class CocoDetection(Dataset[dict[str, Any]]):
    """A COCO data set, as items of `detection.data.collate_detection`.

    Args:
        root: Folder with ``<split>/_annotations.coco.json`` beside the pictures, or COCO's own layout.
        split: ``"train"``, ``"val"`` or ``"test"``.
        annotations: json file, instead of a split of ``root``.
        images: Folder of its pictures; by default the json's own.
        transform: options of `DetectionTransform`.
        labels: ``"contiguous"`` numbers the categories 0 … K−1 by id; ``"category_id"`` keeps the ids, as released
            models with 91 outputs do.
        num_classes: How many outputs the model has; another number of categories is an error.
        skip_empty: Leave out pictures without objects.

    Raises: ValueError as `read_coco`, and for a wrong number of classes.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        split: str = "train",
        annotations: str | Path | None = None,
        images: str | Path | None = None,
        transform: dict[str, Any] | None = None,
        labels: Literal["contiguous", "category_id"] = "contiguous",
        num_classes: int | None = None,
        skip_empty: bool = False,
    ) -> None:
        if (root is None) == (annotations is None):
            raise ValueError("CocoDetection: give either root and split, or annotations")
        if annotations is not None:
            path = Path(annotations)
            folder = path.parent if images is None else Path(images)
        else:
            path, folder = find_split(Path(str(root)), split)
        self.pictures, names = read_coco(path, folder)
        if skip_empty:
            self.pictures = [p for p in self.pictures if any(not record["iscrowd"] for record in p.annotations)]
            if not self.pictures:
                raise ValueError(f"{path}: no image has an object (skip_empty=True)")
        if labels == "category_id":
            ids = list(range(max(names) + 1))
        else:
            ids = list(names)
        if num_classes is not None and len(ids) > num_classes:
            raise ValueError(
                f"CocoDetection: {path} has {len(ids)} classes ({labels}), the model has {num_classes}; "
                f"--set num_classes={len(ids)}"
            )
        self.label_of = {category: label for label, category in enumerate(ids)}
        options = dict(transform or {})
        self.transform = DetectionTransform(**options)
        self.metainfo: dict[str, Any] = {
            "classes": [names.get(category, "") for category in ids],
            "category_ids": ids,
            "preprocess": {key: options[key] for key in ("short_sides", "max_size") if key in options},
        }

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = self.pictures[index]
        pixels = read_image(picture.path)
        records = [{**r, "category_id": self.label_of[r["category_id"]]} for r in picture.annotations]
        objects = [r for r in records if not r["iscrowd"]]
        boxes = torch.tensor([r["bbox"] for r in objects], dtype=torch.float32).view(-1, 4)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        height, width = pixels.shape[-2:]
        boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))
        image, boxes, labels = self.transform(
            pixels, boxes, torch.tensor([r["category_id"] for r in objects], dtype=torch.int64)
        )
        return {
            "image": image,
            "boxes": boxes,
            "labels": labels,
            "image_id": picture.image_id,
            "original_size": (height, width),
            "annotations": records,
        }


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
