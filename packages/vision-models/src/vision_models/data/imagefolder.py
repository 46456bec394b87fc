"""Pictures in one folder per class, with ImageNet's training augmentation."""

from pathlib import Path
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.data.transforms_factory import create_transform
from torch.utils.data import Dataset

from .images import Preprocess, read_image

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class ImageFolder(Dataset[dict[str, Any]]):
    """``root/<class>/…/<picture>``; classes are the folder names in alphabetical order.

    Args:
        root: for ImageNet ``…/train`` or ``…/val``.
        augment: random crop and flip, ``auto_augment`` (timm's policy string), color is left to it, random erasing.
        classes: names to number by, so that validation cannot be numbered otherwise than training; those found by
            default.
        num_classes: how many the model has outputs for; fewer or more folders are an error.

    Shapes: image (3, size, size) float32, normalized with ImageNet's mean and deviation.
    Raises: ValueError for a missing or empty folder, fewer than two classes, and pictures that cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        size: int = 224,
        augment: bool = False,
        auto_augment: str = "rand-m9-mstd0.5-inc1",
        erasing: float = 0.25,
        crop_pct: float = 0.875,
        classes: list[str] | None = None,
        num_classes: int | None = None,
    ) -> None:
        root = Path(root)
        if not root.is_dir():
            raise ValueError(
                f"ImageFolder: {root} is not a folder; expected {root}/<class>/<picture> "
                "(set data_root in the recipe, or --set data_root=...)"
            )
        found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        if len(found) < 2:
            raise ValueError(f"ImageFolder: {root} holds {len(found)} class folder(s), training needs at least two")
        if classes is not None and set(found) - set(classes):
            raise ValueError(f"ImageFolder: {root} holds unknown classes {sorted(set(found) - set(classes))[:5]}")
        names = classes or found
        if num_classes is not None and len(names) != num_classes:
            raise ValueError(
                f"ImageFolder: {root} holds {len(names)} classes, the model has {num_classes}; "
                f"--set classes={len(names)}"
            )
        self.samples: list[tuple[Path, int]] = []
        for name in found:
            pictures = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in SUFFIXES)
            if not pictures:
                raise ValueError(f"ImageFolder: {root / name} holds no pictures ({', '.join(sorted(SUFFIXES))})")
            self.samples += [(path, names.index(name)) for path in pictures]
        preprocess = {"mode": "RGB", "size": [size, size], "crop_pct": crop_pct, "interpolation": "bicubic"}
        self.preprocess = Preprocess(**preprocess)  # pyright: ignore[reportArgumentType]
        self.metainfo: dict[str, Any] = {"classes": list(names), "preprocess": preprocess}
        self.transform = None
        if augment:
            self.transform: Any = create_transform(
                size,
                is_training=True,
                auto_augment=auto_augment,
                re_prob=erasing,
                re_mode="pixel",
                interpolation="bicubic",
                mean=IMAGENET_DEFAULT_MEAN,
                std=IMAGENET_DEFAULT_STD,
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path, label = self.samples[index]
        if self.transform is not None:
            return {"image": self.transform(read_image(path)), "label": label}
        return {"image": self.preprocess.read(path)[1], "label": label}
