"""Files of points: two columns of numbers."""

from pathlib import Path

import numpy as np
import torch

POINT_SUFFIXES = (".csv", ".txt", ".npy")


def read_points(file: Path) -> torch.Tensor:
    """Points (N, 2) of a file.

    Raises:
        ValueError: as :func:`predict`.
    """
    try:
        if file.suffix == ".npy":
            table = np.load(file, allow_pickle=False)
        else:
            text = file.read_text(encoding="utf-8").replace(",", " ").replace(";", " ")
            table = np.array([[float(word) for word in line.split()] for line in text.splitlines() if line.split()])
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file} is not a table of numbers ({', '.join(POINT_SUFFIXES)}): {error}") from None
    if table.size == 0:
        raise ValueError(f"{file} holds no points")
    if table.ndim != 2 or table.shape[1] != 2 or not np.isfinite(table.astype(np.float64)).all():
        raise ValueError(f"{file} must hold two columns of finite numbers, x and y, got shape {table.shape}")
    return torch.from_numpy(table.astype(np.float32))
