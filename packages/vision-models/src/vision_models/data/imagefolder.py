"""Pictures in one folder per class, in folders for training and test or cut into them here."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms_factory import create_transform
from torch.utils.data import Dataset

from attn_core.pictures import ENDINGS, is_picture
from vision_models.data.images import Preprocess, read_image
from vision_models.data.splits import stratified_parts

Split = Literal["train", "val", "test"]
# Names of the folders of each part, as exporters write them; upper case counts as lower case.
FOLDERS: dict[Split, tuple[str, ...]] = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}


class ImageFolder(Dataset[dict[str, Any]]):
    """One part of ``root/train/<class>/…/<picture>``, ``root/val/…``, ``root/test/…``, or of ``root/<class>/…``.

    The classes of every part are the folders of the training part, in alphabetical order; a part with others is
    refused. The test part is the folder ``test``, or else ``val``; where there is neither, a fixed quarter of each
    class is kept out of training for it, at least one picture.

    Args:
        root: the data, or its training folder.
        augment: random crop and flip, ``auto_augment`` (timm's policy string), color is left to it, random erasing.
        min_area: smallest share of the picture that the random crop shows.
        size: side of the result.
        hold_out: share of each class that is kept for the test where no folder is.
        num_classes: how many the model has outputs for; fewer or more folders are an error.
        in_memory: keep every picture, shrunk to twice ``size``, once it was read: for hundreds of large pictures.

    Shapes: image (3, size, size) float32, normalized with ImageNet's mean and deviation.
    Raises: ValueError for a missing or empty folder, fewer than two classes, classes that differ between the parts,
        and pictures that cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        split: Split = "train",
        *,
        size: int = 224,
        augment: bool = False,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        erasing: float = 0.25,
        min_area: float = 0.08,
        crop_pct: float = 0.875,
        hold_out: float = 0.25,
        num_classes: int | None = None,
        in_memory: bool = False,
    ) -> None:
        if split not in FOLDERS:
            raise ValueError(f"ImageFolder: split must be 'train', 'val' or 'test', got split={split!r}")
        if not 0 < hold_out < 1:
            raise ValueError(f"ImageFolder: hold_out must lie between 0 and 1, got hold_out={hold_out}")
        root = Path(root)
        places = parts_of(root)
        classes = class_names(root)
        if num_classes is not None and len(classes) != num_classes:
            raise ValueError(
                f"ImageFolder: {root} holds {len(classes)} classes, the model has {num_classes}; "
                f"--set classes={len(classes)}"
            )
        place = places.get(split) or (places.get("val") if split == "test" else None)
        if place is None and split == "val":
            raise ValueError(f"ImageFolder: {root} has no folder val; leave val_dataloader out, or make one")
        if place is not None and split != "train":
            _same_classes(places["train"], place)
        samples = list(_samples(place or places["train"], classes, may_be_empty=split != "train"))
        if split != "val" and set(places) == {"train"}:
            samples = _cut(samples, places["train"], split, hold_out)
        self.samples: list[tuple[Path, int]] = samples
        if not self.samples:
            raise ValueError(
                f"ImageFolder: {place or root} holds no pictures for the part {split!r}; a class needs at least two, "
                "one for training and one for the test"
            )
        self.in_memory = in_memory
        self.kept: dict[Path, Image.Image] = {}
        self.size = size
        preprocess = {"mode": "RGB", "size": [size, size], "crop_pct": crop_pct, "interpolation": "bicubic"}
        self.preprocess = Preprocess(**preprocess)  # pyright: ignore[reportArgumentType]
        self.metainfo: dict[str, Any] = {"classes": classes, "preprocess": preprocess}
        self.transform = None
        if augment:
            self.transform: Any = create_transform(
                size,
                is_training=True,
                auto_augment=auto_augment,
                re_prob=erasing,
                re_mode="pixel",
                interpolation="bicubic",
                scale=(min_area, 1.0),
                mean=IMAGENET_DEFAULT_MEAN,
                std=IMAGENET_DEFAULT_STD,
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self.samples[index]
        image = self._image(path)
        if self.transform is not None:
            return {"image": self.transform(image), "label": label}
        return {"image": self.preprocess.to_tensor(self.preprocess.crop(image)), "label": label}

    def _image(self, path: Path) -> Image.Image:
        if not self.in_memory:
            return read_image(path)
        if path not in self.kept:
            image = read_image(path)
            shrink = 2 * self.size / min(image.size)
            if shrink < 1:
                sides = round(image.width * shrink), round(image.height * shrink)
                image = image.resize(sides, Image.Resampling.BOX, reducing_gap=2.0)
            self.kept[path] = image
        return self.kept[path]


def parts_of(root: Path) -> dict[Split, Path]:
    """The folders of the parts that there are; ``train`` is ``root`` itself where classes lie directly in it.

    A folder ``train`` that holds pictures, not folders, is a class (of trains).

    Raises: ValueError: no folder.
    """
    if not root.is_dir():
        raise ValueError(
            f"ImageFolder: {root} is not a folder; expected {root}/<class>/<picture> or {root}/train/<class>/<picture> "
            "(set data_root in the recipe, or --set data_root=...)"
        )
    found: dict[Split, Path] = {}
    for split, names in FOLDERS.items():
        for folder in _folders(root):
            if folder.name.lower() in names and not any(is_picture(file) for file in folder.iterdir()):
                found.setdefault(split, folder)
    return found if "train" in found else {"train": root}


def class_names(root: Path) -> list[str]:
    """The classes of ``root``: the folders of its training part, sorted.

    Raises: ValueError: fewer than two, or none with pictures.
    """
    place = parts_of(root)["train"]
    names = sorted(folder.name for folder in _folders(place))
    if len(names) < 2:
        loose = sum(is_picture(file) for file in place.iterdir() if file.is_file())
        beside = f" and {loose} pictures beside them" if loose else ""
        raise ValueError(
            f"ImageFolder: {place} holds {len(names)} class folder(s){beside}, training needs at least two: "
            f"{place}/<class>/<picture>"
        )
    return names


def _folders(place: Path) -> Iterator[Path]:
    return (entry for entry in place.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__MACOSX")))


def _same_classes(train: Path, other: Path) -> None:
    """Numbers of classes mean the same in both parts, or there is nothing to compare."""
    known, found = ({folder.name for folder in _folders(place)} for place in (train, other))
    if known == found:
        return
    lines = [f"{other} has {sorted(found - known)}, which training has not"] if found - known else []
    lines += [f"{other} lacks {sorted(known - found)}"] if known - found else []
    raise ValueError(
        f"ImageFolder: {train} and {other} differ in their classes: {'; '.join(lines)}; rename or add folders (one "
        "without pictures will do)"
    )


def _samples(place: Path, classes: list[str], *, may_be_empty: bool) -> Iterator[tuple[Path, int]]:
    for label, name in enumerate(classes):
        pictures = sorted(path for path in (place / name).rglob("*") if is_picture(path) and path.is_file())
        if not pictures and not may_be_empty:
            raise ValueError(f"ImageFolder: {place / name} holds no pictures ({', '.join(ENDINGS)})")
        yield from ((path, label) for path in pictures)


def _cut(samples: list[tuple[Path, int]], place: Path, split: Split, hold_out: float) -> list[tuple[Path, int]]:
    """The training or test part of pictures that lie in one place; each keeps its part when others are added."""
    names = [path.relative_to(place).as_posix() for path, _ in samples]
    labels = [label for _, label in samples]
    test, train = stratified_parts(labels, (hold_out,), salt="pictures", names=names, at_least=1)
    return [samples[i] for i in (train if split == "train" else test)]
