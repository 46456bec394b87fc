"""Probabilities of a volume, written plane by plane."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from medical_seg.data.volumes import Volume
from medical_seg.inference.volume import Keep


@contextmanager
def probability_file(volume: Volume, stem: Path, model: Any, *, wanted: bool) -> Iterator[Keep | None]:
    """Writes probabilities row by row: (K, *shape of the image file) in float16, under its name when it is complete."""
    if not wanted:
        yield None
        return
    part, path = stem.with_name(f".{stem.name}.part.npy"), stem.with_name(f"{stem.name}_probabilities.npy")
    shape = (model.out_channels, *volume.stored_shape)
    np.lib.format.open_memmap(part, mode="w+", dtype=np.float16, shape=shape).flush()

    def keep(z: int, first: int, logits: Tensor) -> None:
        values = (logits.softmax(0) if model.regions is None else logits.sigmoid()).numpy()
        # Opened anew each time: pages of a mapping that stays open would count as memory of this process.
        file = np.lib.format.open_memmap(part, mode="r+")
        for target, plane in zip(file, values, strict=True):
            volume.canonical(target)[z, first : first + values.shape[1]] = plane

    try:
        yield keep
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
