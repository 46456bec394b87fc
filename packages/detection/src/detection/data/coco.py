"""COCO data sets: which files are a split, one class list for all splits, and items with boxes and their pixels.

Format and its repairs: `detection.data.coco_json`. Checked in: ``data/test_coco.py``.
"""

import functools
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from attn_core.pictures import ENDINGS, read_picture
from detection.data.coco_json import AnnotatedPicture, Findings, Turned, load_json, read_categories, read_coco
from detection.data.transforms import DetectionTransform

logger = logging.getLogger(__name__)

SUFFIXES = frozenset(ENDINGS)
ALIASES = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}
HELD_BACK = 0.15  # of the pictures of a set without splits, for val, and as much for test
MOST_IDS = 100_000


def read_image(path: Path) -> Tensor:
    """An upright picture as (3, Y, X) uint8.

    Raises: ValueError if the file is missing, empty, no picture or damaged; the message names it.
    """
    return torch.from_numpy(read_picture(path).rgb().copy()).permute(2, 0, 1).contiguous()


class Split(NamedTuple):
    """The json of a split, the folder of its pictures, and which part of them it is (``""``: all)."""

    name: str
    json: Path
    folder: Path
    part: str = ""


def find_splits(root: Path, *, divide: bool = False) -> dict[str, Split]:
    """The splits of a data set: ``train``, ``val``, ``test``, those that it has.

    Three layouts are known: Roboflow's ``train/ valid/ test/``, each with ``_annotations.coco.json`` (or one other
    json) beside the pictures; COCO's ``annotations/instances_<split>2017.json`` with ``<split>2017/``; and, with
    ``divide``, one json in the folder or in its ``annotations/``, whose pictures are divided 70 : 15 : 15 by a fixed
    shuffle.
    """
    found: dict[str, Split] = {}
    for split, names in ALIASES.items():
        for name in names:
            if split not in found and (file := _only_json(root / name)):
                found[split] = Split(split, file, root / name)
            for year in ("2017", "2014", ""):
                file = root / "annotations" / f"instances_{name}{year}.json"
                if split not in found and file.is_file():
                    folders = (root / f"{name}{year}", root / "images" / f"{name}{year}", root / "images")
                    found[split] = Split(split, file, next((f for f in folders if f.is_dir()), folders[0]))
    if divide and not found.keys() & {"val", "test"}:
        file = found["train"].json if found else _only_json(root) or _only_json(root / "annotations")
        if file is not None:
            folder = found["train"].folder if found else next((f for f in (root / "images",) if f.is_dir()), root)
            found = {split: Split(split, file, folder, split) for split in ALIASES}
    return found


def find_split(root: Path, split: str | Sequence[str], *, divide: bool = False) -> Split:
    """The first of the wanted splits that a data set has.

    Raises: ValueError if it has none of them.
    """
    wanted = (split,) if isinstance(split, str) else tuple(split)
    if unknown := [name for name in wanted if name not in ALIASES]:
        raise ValueError(f"CocoDetection: split must be of train, val, test, got split={unknown[0]!r}")
    found = find_splits(root, divide=divide)
    for name in wanted:
        if name in found:
            return found[name]
    name = ALIASES[wanted[0]][1 if wanted[0] == "val" else 0]
    raise ValueError(
        f"CocoDetection: {root} holds neither {name}/_annotations.coco.json nor "
        f"annotations/instances_{wanted[0]}2017.json; set data_root in the recipe, or --set data_root=..."
    )


class CocoDetection(Dataset[dict[str, Any]]):
    """A COCO data set, as items of `detection.data.collate_detection`.

    All splits have the class list of the training split: categories of others are found in it by name, and where they
    disagree the data set is refused.

    Args:
        root: Folder in one of the layouts of `find_splits`.
        split: ``"train"``, ``"val"`` or ``"test"``; of several the first that is there.
        annotations: json file, instead of a split of ``root``. images: Folder of its pictures; by default its own.
        classes_from: json file with the class list; by default that of the training split, if ``root`` has one.
        divide: A set without val and test is divided, see `find_splits`.
        transform: options of `DetectionTransform`.
        labels: ``"contiguous"`` numbers the categories 0 … K−1 by id; ``"category_id"`` keeps the ids, as released
            models with 91 outputs do.
        num_classes: How many outputs the model has; more categories are an error.
        skip_empty: Leave out pictures without objects.
        turned: of `read_coco`: how boxes of pictures that EXIF turns are meant.

    Raises: ValueError as `read_coco`, for another class list than in training, and for more classes than the model has.
    """

    def __init__(
        self,
        root: str | Path | None = None,
        *,
        split: str | Sequence[str] = "train",
        annotations: str | Path | None = None,
        images: str | Path | None = None,
        classes_from: str | Path | None = None,
        divide: bool = False,
        transform: dict[str, Any] | None = None,
        labels: Literal["contiguous", "category_id"] = "contiguous",
        num_classes: int | None = None,
        skip_empty: bool = False,
        turned: Turned = "auto",
    ) -> None:
        if (root is None) == (annotations is None):
            raise ValueError("CocoDetection: give either root and split, or annotations")
        if labels not in ("contiguous", "category_id"):
            raise ValueError(f"CocoDetection: labels must be 'contiguous' or 'category_id', got labels={labels!r}")
        if annotations is not None:
            path = Path(annotations)
            where = Split("", path, path.parent if images is None else Path(images))
        else:
            where = find_split(Path(str(root)), split, divide=divide)
            training = find_splits(Path(str(root)), divide=divide).get("train")
            classes_from = classes_from or (training.json if training else None)
        path = where.json
        self.pictures, own, findings = read_coco(path, where.folder, turned=turned)
        if findings.repaired:
            logger.warning("%s: %s", path, "; ".join(findings.repaired))
        if where.part:
            self.pictures = part_of(self.pictures, where.part, path)
        if skip_empty:
            self.pictures = [p for p in self.pictures if any(not record["iscrowd"] for record in p.annotations)]
            if not self.pictures:
                raise ValueError(f"{path}: no image has an object (skip_empty=True)")
        names = own if classes_from is None or Path(classes_from) == path else categories_of(Path(classes_from))
        problem, note = compare_categories(names, own, labels)
        if problem:
            raise ValueError(f"{path}: categories are not those of training ({classes_from}): {problem}")
        if note:
            logger.warning("%s: %s", path, note)
        count = max(names) + 1 if labels == "category_id" else len(names)
        if labels == "category_id" and (min(names) < 0 or count > MOST_IDS):
            raise ValueError(
                f"CocoDetection: {path} has category ids {min(names)} to {max(names)}, which cannot number outputs; "
                "use labels='contiguous'"
            )
        if num_classes is not None and count > num_classes:
            raise ValueError(
                f"CocoDetection: {path} has {count} classes ({labels}), the model has {num_classes}; "
                f"--set num_classes={count}"
            )
        ids = list(range(count)) if labels == "category_id" else list(names)
        place = {name: ids.index(category) for category, name in reversed(names.items())}
        self.label_of = {
            category: ids.index(category) if names.get(category) == name else place[name]
            for category, name in own.items()
        }
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
        height, width = pixels.shape[-2:]
        if picture.size is not None and picture.size != (width, height):
            raise ValueError(
                f"{picture.path}: is {width}×{height}, the json says {picture.size[0]}×{picture.size[1]}; "
                "'detection check' shows all such pictures"
            )
        records = [{**r, "category_id": self.label_of[r["category_id"]]} for r in picture.annotations]
        objects = [r for r in records if not r["iscrowd"]]
        boxes = torch.tensor([r["bbox"] for r in objects], dtype=torch.float32).view(-1, 4)
        boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
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


def part_of(pictures: Sequence[AnnotatedPicture], part: str, path: Path) -> list[AnnotatedPicture]:
    """A third of a set without splits, by a shuffle that depends on the file names alone.

    Raises: ValueError if there are fewer than three pictures.
    """
    if len(pictures) < 3:
        raise ValueError(f"{path}: {len(pictures)} pictures cannot be divided into train, val and test; at least 3")
    order = sorted(pictures, key=lambda picture: hashlib.sha256(picture.path.name.encode("utf-8", "replace")).digest())
    held = max(1, round(HELD_BACK * len(order)))
    bounds = {"val": (0, held), "test": (held, 2 * held), "train": (2 * held, len(order))}
    first, last = bounds[part]
    chosen = {picture.image_id for picture in order[first:last]}
    return [picture for picture in pictures if picture.image_id in chosen]


def categories_of(path: Path) -> dict[int, str]:
    """Category id → name of a COCO json.

    Raises: ValueError that names the file and the first wrong record.
    """
    try:
        stamp = path.stat().st_mtime_ns
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    return dict(_categories(path, stamp))


@functools.lru_cache(maxsize=8)
def _categories(path: Path, _stamp: int) -> tuple[tuple[int, str], ...]:
    content = load_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("categories"), list):
        raise ValueError(f"{path}: not a COCO file, it has no list 'categories'")
    findings = Findings()
    names = read_categories(content["categories"], findings)
    if findings.refused:
        raise ValueError(f"{path}: {findings.refused[0]}")
    return tuple(names.items())


def compare_categories(training: Mapping[int, str], own: Mapping[int, str], labels: str) -> tuple[str, str]:
    """What forbids to number the categories of a split as training's (``""``: nothing), and what is worth a line."""
    missing = sorted(set(training.values()) - set(own.values()))
    extra = sorted(set(own.values()) - set(training.values()))
    if extra:
        lacking = f"; only in training: {', '.join(map(repr, missing))}" if missing else ""
        return f"only here: {', '.join(map(repr, extra))}{lacking}", ""
    if labels == "category_id" and (moved := [key for key, name in own.items() if training.get(key) != name]):
        key = min(moved, key=lambda key: key not in training)
        there = f"{training[key]!r}" if key in training else "nothing"
        return f"id {key} is {own[key]!r} here and {there} in training", ""
    return "", f"it lacks categories of training: {', '.join(map(repr, missing))}" if missing else ""


def _only_json(folder: Path) -> Path | None:
    """The COCO json of a folder: ``_annotations.coco.json``, or the only json there."""
    if not folder.is_dir():
        return None
    if (folder / "_annotations.coco.json").is_file():
        return folder / "_annotations.coco.json"
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".json" and file.is_file())
    return files[0] if len(files) == 1 else None
