"""Windows of the cases of a folder for training, whole cases for validation."""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from monai.transforms import Compose  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor
from torch.utils.data import Dataset

from attn_core.engine import build
from medical_seg.data.folders import open_folder, read_case, read_folds
from medical_seg.data.volumes import Scaling, Volume, measure_scaling, sample_image, sample_label, target_grid

Loaded = tuple[Volume, np.ndarray, list[Scaling], np.ndarray]


class FolderCases(Dataset[dict[str, Any]]):
    """Cases of a folder on a common spacing.

    Args:
        folder: nnU-Net's layout or pictures.
        split: ``"train"`` gives random windows, ``"val"`` whole volumes of the held-out fold, one at a time.
        fold: 0 to 4, or ``"all"``: every case on both sides.
        window: Z, Y, X in voxels.
        spacing: of Z, Y, X in mm; each case is resampled to it, window by window. None resizes each case to one window.
        scaling: one rule per channel, see `measure_scaling`.
        windows_per_case: length of an epoch, per case.
        foreground: share of the windows that are centered on a random foreground voxel.
        geometry_tolerance: mm that image and labels of a case may lie apart; None for a tenth of a voxel.
        transforms: MONAI's dictionary transforms, or their recipes, of ``image`` (C, Z, Y, X) and ``label``
            (1, Z, Y, X); training windows pass through them.
        cache: cases held in memory.

    Items: image (C, Z, Y, X) float32; label (Z, Y, X) int64.
    Raises: ValueError for a folder or fold that cannot be used; for a broken file when it is read.
    """

    def __init__(
        self,
        folder: str,
        *,
        split: Literal["train", "val"],
        fold: int | Literal["all"] = 0,
        window: Sequence[int],
        spacing: Sequence[float] | None,
        scaling: Sequence[Any],
        windows_per_case: int = 8,
        foreground: float = 1 / 3,
        transforms: Sequence[Any] = (),
        geometry_tolerance: float | None = None,
        cache: int = 64,
    ) -> None:
        if not folder:
            raise ValueError("FolderCases: no data folder given; use -d FOLDER")
        if split not in ("train", "val"):
            raise ValueError(f"FolderCases: split must be 'train' or 'val', got split={split!r}")
        self.folder = open_folder(Path(folder), tolerance=geometry_tolerance)
        names = [case.name for case in self.folder.cases]
        if fold != "all":
            folds = read_folds(self.folder)
            if not 0 <= fold < len(folds):
                raise ValueError(f"{folder}: there is no fold {fold}; there are 0 to {len(folds) - 1}, and 'all'")
            names = folds[fold][split]
        self.cases = [case for case in self.folder.cases if case.name in names]
        self.split = split
        self.window = tuple(window)
        self.spacing = None if spacing is None else tuple(spacing)
        self.scaling = list(scaling)
        self.windows_per_case = windows_per_case
        self.foreground = foreground
        built = [build(dict(given) if isinstance(given, Mapping) else given) for given in transforms]
        self.transform = Compose(built, map_items=False) if built else None
        self._load = lru_cache(cache)(self._read)
        self.metainfo: dict[str, Any] = {
            "classes": list(self.folder.classes),
            "channels": list(self.folder.channels),
            "spacing": None if self.spacing is None else list(self.spacing),
            "scaling": self.scaling,
            "window": list(self.window),
            "pictures": self.folder.is_pictures,
            **({"regions": self.folder.regions, "order": self.folder.order} if self.folder.regions else {}),
        }

    def __len__(self) -> int:
        return len(self.cases) * (self.windows_per_case if self.split == "train" else 1)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label, scalings, foreground = self._load(index % len(self.cases))
        grid = target_grid(image, self.spacing, self.window)
        if self.split == "val":
            start, size = (0, 0, 0), grid
        else:
            start, size = self._draw(grid, image.grid, foreground), self.window
        labels = self.folder.labels + (self.folder.ignore is not None)
        window = sample_image(image, scalings, grid, start, size)
        target = sample_label(label, labels, grid, start, size)
        if self.split == "val" or self.transform is None:
            return {"image": window, "label": target}
        # MONAI's transforms have generators of their own: seeded here, an item depends on the engine's seed alone.
        self.transform.set_random_state(int(torch.randint(2**31, ())))
        item: Any = self.transform({"image": window, "label": target[None]})
        window, target = (item[key].as_subclass(Tensor) for key in ("image", "label"))  # MONAI's own carry a history
        return {"image": window.float(), "label": target[0].long()}

    def _read(self, index: int) -> Loaded:
        image, label = read_case(self.folder, self.cases[index])
        scalings = [measure_scaling(c, rule) for c, rule in zip(image.data, self.scaling, strict=True)]
        inside = label > 0
        if self.folder.ignore is not None:
            inside &= label != self.folder.ignore
        foreground = np.flatnonzero(inside)
        if len(foreground) > 10_000:  # enough to draw centers from
            foreground = np.random.default_rng(index).choice(foreground, 10_000, replace=False)
        return image, label, scalings, foreground

    def _draw(self, grid: Sequence[int], stored: Sequence[int], foreground: np.ndarray) -> tuple[int, ...]:
        """First voxel of a random window; a volume smaller than the window lies in its middle."""
        free = [n - w for n, w in zip(grid, self.window, strict=True)]
        start = [int(torch.randint(f + 1, ())) if f > 0 else f // 2 for f in free]
        if len(foreground) and float(torch.rand(())) < self.foreground:
            voxel = np.unravel_index(foreground[int(torch.randint(len(foreground), ()))], tuple(stored))
            for axis, (v, n, m) in enumerate(zip(voxel, stored, grid, strict=True)):
                if free[axis] > 0:
                    start[axis] = min(max(int((v + 0.5) * m / n) - self.window[axis] // 2, 0), free[axis])
        return tuple(start)
