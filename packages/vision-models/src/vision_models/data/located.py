"""Pictures whose objects have boxes, for training from labels alone: CUB-200-2011 and ImageNet-1k."""

import xml.etree.ElementTree as Xml
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.utils.data import Dataset

from attn_core.pictures import ENDINGS
from vision_models.data.images import Preprocess, read_image

Box = tuple[float, float, float, float]  # left, top, right, bottom, in pixels of the file


class LocatedPictures(Dataset[dict[str, Any]]):
    """Pictures squeezed to a square, cut to a smaller one; boxes follow.

    Args:
        files: of the pictures. labels: their classes. boxes: of each picture, or None for training.
        classes: names.
        size: side of the result, cut from the middle of ``resize``², or at random for training, half of them flipped.

    Shapes: image (3, size, size) float32, normalized; boxes (M, 4), rounded down and cut at the result's border as the
        official code does; a picture with fewer than the most of all repeats its first.
    """

    def __init__(
        self,
        files: Sequence[Path],
        labels: Sequence[int],
        boxes: Sequence[Sequence[Box]] | None,
        classes: Sequence[str],
        *,
        size: int = 224,
        resize: int = 256,
    ) -> None:
        if not 0 < size <= resize:
            raise ValueError(f"{type(self).__name__}: size must be from 1 to resize={resize}, got size={size}")
        self.files = list(files)
        self.labels = list(labels)
        self.boxes = boxes
        self.size = size
        self.resize = resize
        self.most = max((len(row) for row in boxes), default=1) if boxes is not None else 0
        mean, std = list(IMAGENET_DEFAULT_MEAN), list(IMAGENET_DEFAULT_STD)
        self.to_tensor = Preprocess(size=(size, size), mean=mean, std=std).to_tensor
        self.metainfo: dict[str, Any] = {
            "classes": list(classes),
            "preprocess": {
                "mode": "RGB", "size": [size, size], "mean": mean, "std": std, "crop_pct": size / resize,
            },
        }  # fmt: skip

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        picture = read_image(self.files[index])
        width, height = picture.size
        picture = picture.resize((self.resize, self.resize), Image.Resampling.BILINEAR)
        slack = self.resize - self.size
        if self.boxes is None:
            left, top = (int(torch.randint(slack + 1, ())) for _ in range(2))
        else:
            left = top = slack // 2
        picture = picture.crop((left, top, left + self.size, top + self.size))
        if self.boxes is None:
            if bool(torch.rand(()) < 0.5):
                picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            return {"image": self.to_tensor(picture), "label": self.labels[index]}
        rows = self.boxes[index]
        scale = torch.tensor([self.resize / width, self.resize / height] * 2)
        boxes = torch.tensor(rows) * scale - slack // 2
        boxes = boxes.floor().clamp(0, self.size - 1)
        boxes = torch.cat([boxes, boxes[:1].expand(self.most - len(boxes), 4)])
        return {"image": self.to_tensor(picture), "label": self.labels[index], "boxes": boxes}


class CUB(LocatedPictures):
    """Caltech-UCSD Birds 200-2011 as its archive unpacks: 5,994 pictures to train, 5,794 to test, one box each.

    Args:
        root: the folder with ``images.txt``, or the one above it.
        size, resize: as of :class:`LocatedPictures`.

    Raises: ValueError: a file or an entry of it is missing or odd; the message names it.
    """

    def __init__(
        self, root: str | Path, split: Literal["train", "test"] = "train", *, size: int = 224, resize: int = 256
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"CUB: split must be 'train' or 'test', got split={split!r}")
        folder = next((f for f in (Path(root), Path(root, "CUB_200_2011")) if (f / "images.txt").is_file()), None)
        if folder is None:
            raise ValueError(f"CUB: {root} holds no images.txt; give the folder that CUB_200_2011.tgz unpacks to")
        names, parts, labels = (
            _table(folder / f"{name}.txt") for name in ("images", "train_test_split", "image_class_labels")
        )
        classes, corners = _table(folder / "classes.txt"), _table(folder / "bounding_boxes.txt")
        wanted = "1" if split == "train" else "0"
        chosen = [key for key in names if _entry(folder, "train_test_split", parts, key) == wanted]
        numbers = {key: i for i, key in enumerate(classes)}
        found = []
        for key in chosen:
            label = _entry(folder, "image_class_labels", labels, key)
            if label not in numbers:
                raise ValueError(f"{folder / 'image_class_labels.txt'}: picture {key} has class {label!r}, which "
                                 "classes.txt does not name")  # fmt: skip
            found.append(numbers[label])
        boxes = None
        if split == "test":
            boxes = [[_corner_box(folder, key, _entry(folder, "bounding_boxes", corners, key))] for key in chosen]
        files = [folder / "images" / names[key] for key in chosen]
        super().__init__(files, found, boxes, list(classes.values()), size=size, resize=resize)


def _table(file: Path) -> dict[str, str]:
    """Lines ``key value…`` of a file, by key."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"CUB: {file} cannot be read: {error}") from None
    pairs = [line.split(maxsplit=1) for line in lines if line.strip()]
    if bad := next((pair for pair in pairs if len(pair) != 2), None):
        raise ValueError(f"{file}: expected a number and a value in each line, got {' '.join(bad)!r}")
    return {key: value.strip() for key, value in pairs}


def _entry(folder: Path, name: str, table: dict[str, str], key: str) -> str:
    if key not in table:
        raise ValueError(f"{folder / name}.txt: picture {key} of images.txt is missing")
    return table[key]


def _corner_box(folder: Path, key: str, text: str) -> Box:
    """``left top width height`` as corners."""
    try:
        left, top, width, height = map(float, text.split())
    except ValueError:
        raise ValueError(f"{folder / 'bounding_boxes.txt'}: picture {key} has no four numbers but {text!r}") from None
    if not (width > 0 and height > 0):
        raise ValueError(f"{folder / 'bounding_boxes.txt'}: the box of picture {key} has no area: {text!r}")
    return left, top, left + width, top + height


class ImageNetBoxes(LocatedPictures):
    """ImageNet-1k in folders of classes, validated on the boxes of its annotations (VOC's XML, a file a picture).

    Args:
        root: with ``train/<class>/*`` and ``val/<class>/*``.
        annotations: folder of the XML files of ``val``, at any depth; needed for the split ``"val"``.
        size, resize: as of :class:`LocatedPictures`.

    Raises: ValueError: a folder, a picture's annotation or a box is missing or odd; the message names it.
    """

    def __init__(
        self,
        root: str | Path,
        split: Literal["train", "val"] = "train",
        *,
        annotations: str | Path | None = None,
        size: int = 224,
        resize: int = 256,
    ) -> None:
        if split not in ("train", "val"):
            raise ValueError(f"ImageNetBoxes: split must be 'train' or 'val', got split={split!r}")
        folders = {part: Path(root, part) for part in ("train", "val")}
        if not folders["train"].is_dir() or not folders[split].is_dir():
            raise ValueError(f"ImageNetBoxes: {root} needs the folders train and val, with a folder for each class")
        classes = sorted(folder.name for folder in folders["train"].iterdir() if folder.is_dir())
        files, labels = [], []
        for number, name in enumerate(classes):
            own = sorted(f for f in Path(folders[split], name).glob("*") if f.suffix.lower() in ENDINGS)
            files += own
            labels += [number] * len(own)
        if not files:
            raise ValueError(f"ImageNetBoxes: {folders[split]} holds no pictures in folders of the training classes")
        boxes = None
        if split == "val":
            if annotations is None:
                raise ValueError("ImageNetBoxes: split='val' needs annotations=, the folder of the XML files")
            known = {file.stem: file for file in Path(annotations).rglob("*.xml")}
            missing = next((file for file in files if file.stem not in known), None)
            if missing is not None:
                raise ValueError(f"ImageNetBoxes: {annotations} has no {missing.stem}.xml for {missing}")
            boxes = [_voc_boxes(known[file.stem]) for file in files]
        super().__init__(files, labels, boxes, classes, size=size, resize=resize)


def _voc_boxes(file: Path) -> list[Box]:
    try:
        objects = Xml.parse(file).getroot().findall("object")
        rows = [
            tuple(float(o.findtext(f"bndbox/{n}") or "") for n in ("xmin", "ymin", "xmax", "ymax")) for o in objects
        ]
    except (OSError, Xml.ParseError, ValueError) as error:
        raise ValueError(f"ImageNetBoxes: {file} is no annotation of boxes: {error}") from None
    boxes: list[Box] = [(a, b, c, d) for a, b, c, d in rows if c > a and d > b]
    if not boxes:
        raise ValueError(f"ImageNetBoxes: {file} has no box with an area")
    return boxes
