"""ExDark and DARK FACE as their authors distribute them: pictures taken in the dark, with boxes.

ExDark: Loh and Chan, CVIU 2019; https://github.com/cs-chan/Exclusively-Dark-Image-Dataset. 7,363 pictures, 12 classes,
splits in ``imageclasslist.txt``. DARK FACE: Yang et al., IEEE TIP 2020; https://flyywh.github.io/CVPRW2019LowLight.
6,000 pictures with faces; the test set's labels are not public. Neither is downloaded here. Checked in:
``data/test_low_light.py``.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch.utils.data import Dataset

from detection.data.coco import SUFFIXES, read_image
from detection.data.transforms import DetectionTransform

Splits = Literal["train", "val", "test"]
EXDARK = ("Bicycle", "Boat", "Bottle", "Bus", "Car", "Cat", "Chair", "Cup", "Dog", "Motorbike", "People", "Table")
NUMBERS = {"train": "1", "val": "2", "test": "3"}  # of the splits, in imageclasslist.txt
HELD_BACK = 0.1  # of DARK FACE for val, and as much for test
Box = tuple[float, float, float, float]


class BoxedPicture(NamedTuple):
    """A file, boxes xyxy in its pixels, and their labels."""

    path: Path
    boxes: list[Box]
    labels: list[int]


class BoxedPictures(Dataset[dict[str, Any]]):
    """Pictures with boxes, as items of `detection.data.collate_detection`.

    Args:
        pictures: what is read when it is asked for. classes: names of the labels.
        transform: options of `DetectionTransform`.

    Raises: ValueError, when an item is read, for a picture that cannot be decoded and a box that lies outside it.
    """

    def __init__(
        self, pictures: Sequence[BoxedPicture], classes: Sequence[str], transform: dict[str, Any] | None = None
    ) -> None:
        options = dict(transform or {})
        self.pictures = list(pictures)
        self.transform = DetectionTransform(**options)
        self.metainfo: dict[str, Any] = {
            "classes": list(classes),
            "category_ids": list(range(1, len(classes) + 1)),
            "preprocess": {key: options[key] for key in ("short_sides", "max_size") if key in options},
        }

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, found, labels = self.pictures[index]
        pixels = read_image(path)
        height, width = pixels.shape[-2:]
        boxes = torch.tensor(found, dtype=torch.float32).view(-1, 4)
        boxes = torch.minimum(boxes.clamp(min=0), boxes.new_tensor([width, height, width, height]))
        sizes = boxes[:, 2:] - boxes[:, :2]
        for box, size in zip(found, sizes.tolist(), strict=True):
            if min(size) <= 0:
                raise ValueError(f"{path}: box {box} (xyxy) lies outside the picture of {width}×{height}")
        image, moved, kept = self.transform(pixels, boxes, torch.tensor(labels, dtype=torch.int64))
        records = [
            {"bbox": [*corner, *size], "category_id": label, "area": size[0] * size[1], "iscrowd": 0}
            for corner, size, label in zip(boxes[:, :2].tolist(), sizes.tolist(), labels, strict=True)
        ]
        return {
            "image": image,
            "boxes": moved,
            "labels": kept,
            "image_id": index + 1,
            "original_size": (height, width),
            "annotations": records,
        }


class ExDark(BoxedPictures):
    """ExDark, labels 0 … 11 in the order of its class numbers.

    Args:
        root: Folder with ``imageclasslist.txt``, the pictures and, as ``<picture>.txt``, the boxes (``ExDark`` and
            ``ExDark_Annno`` unpacked, at any depth; upper and lower case are one).
        split: as the authors divide it: 3,000, 1,800 and 2,563 pictures.
        transform: options of `DetectionTransform`.

    Raises: ValueError for an unknown split, a missing list, picture or file of boxes, and lines that are none.
    """

    def __init__(self, root: str | Path, *, split: Splits = "train", transform: dict[str, Any] | None = None) -> None:
        super().__init__(read_exdark(Path(root), split), EXDARK, transform)


class DarkFace(BoxedPictures):
    """DARK FACE's labelled pictures: one class, ``face``.

    Args:
        root: Folder with ``image`` and ``label``, at any depth.
        split: 80 : 10 : 10 by a shuffle that depends on the file names alone: ours, the authors publish none.
        transform: options of `DetectionTransform`.

    Raises: ValueError for an unknown split, a folder without pictures, a missing file of boxes, lines that are none.
    """

    def __init__(self, root: str | Path, *, split: Splits = "train", transform: dict[str, Any] | None = None) -> None:
        super().__init__(read_dark_face(Path(root), split), ("face",), transform)


def read_exdark(root: Path, split: str) -> list[BoxedPicture]:
    """The pictures of a split of ExDark; see `ExDark`."""
    _known("ExDark", split)
    lists = sorted(root.rglob("imageclasslist.txt"))
    if not lists:
        raise ValueError(f"ExDark: {root} holds no imageclasslist.txt; it comes with the annotations")
    files = {path.name.lower(): path for path in sorted(root.rglob("*")) if path.is_file()}
    numbers = {name.lower(): number for number, name in enumerate(EXDARK)}
    found = []
    for place, words in _lines(lists[0]):
        if words[0].lower().startswith("name"):
            continue  # the heading
        if len(words) != 5:
            raise ValueError(f"{place}: expected name, class, light, place and split, got {' '.join(words)!r}")
        if words[4] != NUMBERS[split]:
            continue
        name = words[0].lower()
        boxes: list[Box] = []
        labels: list[int] = []
        for where, parts in _lines(_file(files, f"{name}.txt", root)):
            if parts[0].startswith("%"):
                continue  # the heading: % bbGt version=3
            if parts[0].lower() not in numbers:
                raise ValueError(f"{where}: unknown class {parts[0]!r}")
            x, y, width, height = _four(where, parts[1:5])
            boxes.append((x, y, x + width, y + height))
            labels.append(numbers[parts[0].lower()])
        found.append(BoxedPicture(_file(files, name, root), boxes, labels))
    if not found:
        raise ValueError(f"{lists[0]}: names no picture of split {split}")
    return found


def read_dark_face(root: Path, split: str) -> list[BoxedPicture]:
    """The pictures of a split of DARK FACE; see `DarkFace`."""
    _known("DarkFace", split)
    every = sorted(path for path in root.rglob("*") if path.is_file())
    labels = {path.stem: path for path in every if path.suffix == ".txt" and path.parent.name.startswith("label")}
    pictures = [p for p in every if p.suffix.lower() in SUFFIXES and p.parent.name.startswith("image")]
    if not pictures:
        raise ValueError(f"DarkFace: {root} holds no pictures in a folder 'image'")
    pictures.sort(key=lambda path: hashlib.sha256(path.name.encode()).digest())
    held = round(HELD_BACK * len(pictures))
    bounds = {"val": (0, held), "test": (held, 2 * held), "train": (2 * held, len(pictures))}
    found = []
    for path in pictures[slice(*bounds[split])]:
        if path.stem not in labels:
            raise ValueError(f"DarkFace: there is no label/{path.stem}.txt for {path}")
        boxes = [_four(place, words) for place, words in _lines(labels[path.stem]) if len(words) != 1]
        count = next((words[0] for _, words in _lines(labels[path.stem]) if len(words) == 1), "")
        if count != str(len(boxes)):
            raise ValueError(f"{labels[path.stem]}: announces {count or 'nothing'}, holds {len(boxes)} boxes")
        found.append(BoxedPicture(path, boxes, [0] * len(boxes)))
    return found


def _known(caller: str, split: str) -> None:
    if split not in NUMBERS:
        raise ValueError(f"{caller}: split must be 'train', 'val' or 'test', got split={split!r}")


def _lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Place and words of each line that is not empty."""
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        if words := line.split():
            yield f"{path}:{number}", words


def _file(files: dict[str, Path], name: str, root: Path) -> Path:
    if name not in files:
        raise ValueError(f"ExDark: {root} holds no {name}, which imageclasslist.txt names")
    return files[name]


def _four(place: str, words: Sequence[str]) -> Box:
    try:
        a, b, c, d = (float(word) for word in words)
    except ValueError:
        raise ValueError(f"{place}: expected four numbers, got {' '.join(words)!r}") from None
    if not all(map(math.isfinite, (a, b, c, d))):
        raise ValueError(f"{place}: expected four numbers, got {' '.join(words)!r}")
    return a, b, c, d
