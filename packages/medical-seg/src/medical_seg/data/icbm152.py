"""The ICBM 2009a average brain that every installation of nilearn carries: T1 → CSF, grey and white matter.

Source: Fonov et al., NeuroImage 54, 2011; files mni_icbm152_*_tal_nlin_sym_09a of nilearn. One average of 152 people:
a demonstration, no benchmark. Every second voxel is taken (2 mm), as nilearn's own resampling to 2 mm does.

The files are exactly symmetric, so a left/right split would show the test set in training. Coronal blocks are held
out instead: training ends 6 mm before the test block begins.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from medical_seg.data.volumes import Volume

CLASSES = ("background", "CSF", "grey matter", "white matter")
SPACING = 2.0
TRAIN_END, TEST_BEGIN = 56, 60  # along Y, from the back of the head to the front
BRAIN = 0.2  # of the greatest intensity, nilearn's own threshold for the brain


class Icbm152(Dataset[dict[str, Any]]):
    """Random windows of the block behind, or the whole block in front as one item.

    Args:
        split: ``"train"`` or ``"test"``.
        window: side of the cubes, or Z, Y, X of boxes; (1, Y, X) cuts axial planes.
        windows: length of an epoch.
        augment: left/right flip, brightness, contrast, noise.

    Items: image (1, Z, Y, X) float32, zero mean; label (Z, Y, X) int64.
    Raises: ValueError if nilearn is missing.
    """

    def __init__(
        self,
        split: Literal["train", "test"],
        *,
        window: int | Sequence[int] = 32,
        windows: int = 400,
        augment: bool = True,
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f"Icbm152: split must be 'train' or 'test', got split={split!r}")
        image, label = load_icbm152()
        part = slice(0, TRAIN_END) if split == "train" else slice(TEST_BEGIN, None)
        self.image = torch.from_numpy(scaled(image)[:, part].copy())[None]
        self.label = torch.from_numpy(label[:, part].copy())
        self.split = split
        self.window = (window,) * 3 if isinstance(window, int) else tuple(window)
        self.windows = windows
        self.augment = augment
        self.metainfo: dict[str, Any] = {
            "classes": list(CLASSES),
            "channels": ["T1"],
            "spacing": [SPACING] * 3,
            "scaling": ["zscore"],
            "window": list(self.window),
        }

    def __len__(self) -> int:
        return self.windows if self.split == "train" else 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.split == "test":
            return {"image": self.image, "label": self.label}
        free = [n - side + 1 for n, side in zip(self.label.shape, self.window, strict=True)]
        start = [int(torch.randint(count, ())) for count in free]
        place = tuple(slice(a, a + side) for a, side in zip(start, self.window, strict=True))
        image, label = self.image[(slice(None), *place)], self.label[place]
        return dict(zip(("image", "label"), _varied(image, label) if self.augment else (image, label), strict=True))


def load_icbm152() -> tuple[np.ndarray, np.ndarray]:
    """T1 in [0, 1] and labels 0 to 3, both (Z, Y, X) at 2 mm: (95, 117, 99).

    CSF is what grey and white matter leave of the brain; the greatest share names a voxel.
    """
    t1, grey, white = (_read(name) for name in ("t1", "gm", "wm"))
    shares = np.stack([1 - grey - white, grey, white])
    label = np.where(t1 > BRAIN, 1 + shares.argmax(0), 0)
    return t1, label.astype(np.int64)


def icbm152_volume(image: np.ndarray) -> Volume:
    """A block of the brain as a `Volume`, for writing."""
    affine = np.diag([SPACING, SPACING, SPACING, 1.0])
    orientation = np.array([[0.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    return Volume(image[None], (SPACING,) * 3, affine, orientation, None, Path("icbm152"))  # pyright: ignore[reportArgumentType]


def scaled(image: np.ndarray) -> np.ndarray:
    """Zero mean and unit deviation over the brain, as the scaling rule zscore has it."""
    inside = image[image > 0]
    return ((image - inside.mean()) / inside.std()).astype(np.float32)


def three_means(image: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """The baseline: brain voxels in three groups of intensity (Lloyd's algorithm in one dimension), dark to bright."""
    values = image[brain]
    centers = np.quantile(values, (0.1, 0.5, 0.9))
    for _ in range(100):
        nearest = np.abs(values[:, None] - centers).argmin(1)
        moved = np.array([values[nearest == k].mean() for k in range(3)])
        if np.allclose(moved, centers, atol=1e-7):
            break
        centers = moved
    label = np.zeros(image.shape, dtype=np.int64)
    label[brain] = 1 + np.abs(values[:, None] - centers).argmin(1)
    return label


def _read(name: str) -> np.ndarray:
    # nilearn is found, not imported: its file is all we need, and the import takes seconds.
    spec = importlib.util.find_spec("nilearn")
    if spec is None or spec.origin is None:
        raise ValueError("Icbm152: nilearn, which brings the brain, is not installed; pip install 'medical-seg[demo]'")
    import nibabel

    file = Path(spec.origin).parent / "datasets" / "data" / f"mni_icbm152_{name}_tal_nlin_sym_09a_converted.nii.gz"
    if not file.is_file():
        raise ValueError(f"Icbm152: {file.name} is not in this installation of nilearn; install nilearn>=0.12")
    image: Any = nibabel.loadsave.load(file)  # pyright: ignore[reportAttributeAccessIssue]
    array = np.asanyarray(image.dataobj).astype(np.float32)
    return (array / array.max())[::2, ::2, ::2].transpose(2, 1, 0).copy()


def _varied(image: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    if float(torch.rand(())) < 0.5:
        image, label = image.flip(3), label.flip(2)
    contrast, brightness, noise = (float(torch.rand(())) for _ in range(3))
    image = image * (0.9 + 0.2 * contrast) + 0.2 * (brightness - 0.5)
    return image + 0.05 * noise * torch.randn(image.shape), label
