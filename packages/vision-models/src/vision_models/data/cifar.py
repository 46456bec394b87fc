"""CIFAR-10 and CIFAR-100 from the official archives, python or binary version, packed or unpacked; no download.

Source: A. Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009; https://www.cs.toronto.edu/~kriz/cifar.html
"""

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from timm.data.transforms_factory import create_transform
from torch.utils.data import Dataset

from vision_models.data.splits import stratified_parts

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


class Layout(NamedTuple):
    python: str
    binary: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    label_key: bytes
    names: tuple[str, bytes, str]  # python file and key, binary file
    label_bytes: int  # before each image of the binary version; the fine label is the last


LAYOUTS = {
    10: Layout(
        "cifar-10-batches-py",
        "cifar-10-batches-bin",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",),
        b"labels",
        ("batches.meta", b"label_names", "batches.meta.txt"),
        1,
    ),
    100: Layout(
        "cifar-100-python",
        "cifar-100-binary",
        ("train",),
        ("test",),
        b"fine_labels",
        ("meta", b"fine_label_names", "fine_label_names.txt"),
        2,
    ),
}


class Cifar(Dataset[dict[str, Any]]):
    """One part of CIFAR: train (45,000), val (5,000 of the official training images, stratified) or test (10,000).

    Args:
        root: the folder that holds the unpacked archive, or the ``.tar.gz`` itself.
        classes: 10 or 100.
        augment: random crop from a padded image, flip, ``auto_augment`` (timm's policy string), random erasing.
        size: side of the result; larger than 32 enlarges.

    Shapes: image (3, size, size) float32, normalized.
    Raises: ValueError if the archive is not there or is not CIFAR.
    """

    def __init__(
        self,
        root: str | Path,
        split: Literal["train", "val", "test"] = "train",
        *,
        classes: Literal[10, 100] = 10,
        size: int = 32,
        augment: bool = False,
        auto_augment: str | None = "rand-m9-mstd0.5-inc1",
        erasing: float = 0.25,
    ) -> None:
        if split not in ("train", "val", "test") or classes not in LAYOUTS:
            raise ValueError(
                f"Cifar: split must be 'train', 'val' or 'test' and classes 10 or 100, got {split!r}, {classes}"
            )
        layout = LAYOUTS[classes]
        files = layout.test if split == "test" else layout.train
        self.images, labels, names = _load(Path(root), layout, files, classes)
        if split != "test":
            val, train = stratified_parts(labels, (0.1,), salt=f"cifar{classes}")
            index = val if split == "val" else train
            self.images, labels = self.images[index], labels[index]
        self.labels: list[int] = labels.tolist()
        self.metainfo: dict[str, Any] = {
            "classes": names,
            "preprocess": {"mode": "RGB", "size": [size, size], "mean": list(MEAN), "std": list(STD)},
        }
        shared: dict[str, Any] = {"interpolation": "bicubic", "mean": MEAN, "std": STD}
        if augment:
            self.transform: Any = create_transform(
                size,
                is_training=True,
                no_aug=False,
                scale=(0.6, 1.0),
                auto_augment=auto_augment,
                re_prob=erasing,
                re_mode="pixel",
                **shared,
            )
        else:
            self.transform = create_transform(size, is_training=False, crop_pct=1.0, **shared)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from PIL import Image

        return {"image": self.transform(Image.fromarray(self.images[index])), "label": self.labels[index]}


def _load(root: Path, layout: Layout, files: tuple[str, ...], classes: int) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images (N, 32, 32, 3) uint8, labels (N,), class names."""
    read, folder = _open(root, layout, classes)
    if folder == layout.python:
        batches = [_unpickle(read(name), name) for name in files]
        pixels = np.concatenate([batch[b"data"] for batch in batches])
        labels = np.concatenate([np.asarray(batch[layout.label_key], dtype=np.int64) for batch in batches])
        names = [name.decode() for name in _unpickle(read(layout.names[0]), layout.names[0])[layout.names[1]]]
    else:
        rows = np.concatenate([_rows(read(f"{name}.bin"), layout, name) for name in files])
        pixels, labels = rows[:, layout.label_bytes :], rows[:, layout.label_bytes - 1].astype(np.int64)
        names = read(layout.names[2]).decode().split()
    if len(names) != classes or labels.min(initial=0) < 0 or labels.max(initial=0) >= classes:
        raise ValueError(f"Cifar: {root} does not hold CIFAR-{classes}: {len(names)} classes, labels to {labels.max()}")
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1).copy(), labels, names


def _open(root: Path, layout: Layout, classes: int) -> tuple[Callable[[str], bytes], str]:
    for folder in (layout.python, layout.binary):
        for base in (root / folder, root):
            if base.name == folder and base.is_dir():
                return _missing_named(lambda name, base=base: (base / name).read_bytes(), base), folder
    for folder in (layout.python, layout.binary):
        archive_name = f"cifar-{classes}-{'python' if folder == layout.python else 'binary'}.tar.gz"
        for archive in (root / archive_name, root):
            if archive.name == archive_name and archive.is_file():
                with tarfile.open(archive) as tar:
                    members = {Path(m.name).name: m for m in tar.getmembers() if m.isfile()}
                    # Read at once: seeking in a compressed archive starts from its beginning each time.
                    content = {name: tar.extractfile(member).read() for name, member in members.items()}  # pyright: ignore[reportOptionalMemberAccess]
                return _missing_named(content.__getitem__, archive), folder
    raise ValueError(
        f"Cifar: {root} holds neither {layout.python}/ nor {layout.binary}/ nor cifar-{classes}-python.tar.gz; "
        f"download it from https://www.cs.toronto.edu/~kriz/cifar.html and put it there (or --set data_root=...)"
    )


def _missing_named(read: Callable[[str], bytes], where: Path) -> Callable[[str], bytes]:
    def checked(name: str) -> bytes:
        try:
            return read(name)
        except (KeyError, OSError):
            raise ValueError(f"Cifar: {where} lacks the file {name}; unpack the archive again") from None

    return checked


class _ArrayUnpickler(pickle.Unpickler):
    """Arrays and plain containers only: the python version of the archive is a pickle, which could run anything."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype"})

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in self.ALLOWED:
            return getattr(np, name) if name != "_reconstruct" else np.array(0).__reduce__()[0]
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in old protocols
            import _codecs

            return _codecs.encode
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickle(content: bytes, name: str) -> dict[bytes, Any]:
    try:
        return _ArrayUnpickler(io.BytesIO(content), encoding="bytes").load()
    except Exception as error:  # a damaged pickle fails in many ways
        raise ValueError(f"Cifar: the file {name} is not a CIFAR batch: {error}") from None


def _rows(content: bytes, layout: Layout, name: str) -> np.ndarray:
    width = layout.label_bytes + 3072
    if not content or len(content) % width:
        raise ValueError(f"Cifar: the file {name}.bin has {len(content)} bytes, not a multiple of {width}")
    return np.frombuffer(content, np.uint8).reshape(-1, width)
