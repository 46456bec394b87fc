"""Files of points: two columns of numbers."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

POINT_SUFFIXES = (".csv", ".txt", ".npy")
LARGEST = 1e30  # of a coordinate: differences and their squares stay finite in float64


def read_points(file: Path) -> Float[Tensor, "N 2"]:
    """Points of a file: a NumPy array, or lines of two numbers with commas, semicolons or blanks between them.

    Raises:
        ValueError: no table of numbers, no points, other than two columns, numbers that are not finite or above 1e30.
    """
    try:
        table = _read_array(file) if file.suffix.lower() == ".npy" else _read_lines(file)
    except (ValueError, TypeError, EOFError, MemoryError, OverflowError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ValueError(f"{file} is not a table of numbers ({', '.join(POINT_SUFFIXES)}): {reason}") from None
    if table.size == 0:
        raise ValueError(f"{file} holds no points")
    if table.ndim != 2 or table.shape[1] != 2 or not np.isfinite(table).all():
        raise ValueError(f"{file} must hold two columns of finite numbers, x and y, got shape {table.shape}")
    if np.abs(table).max() > LARGEST:
        raise ValueError(f"{file} must hold numbers up to {LARGEST:g}, got {np.abs(table).max():g}")
    return torch.from_numpy(table)


def _read_array(file: Path) -> np.ndarray:
    array = np.load(file, allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iufb":
        raise ValueError(f"it holds {getattr(array, 'dtype', 'several arrays')}, not one array of real numbers")
    return array.astype(np.float64)


def _read_lines(file: Path) -> np.ndarray:
    text = file.read_text(encoding="utf-8-sig").replace(",", " ").replace(";", " ")
    return np.array([[float(word) for word in line.split()] for line in text.splitlines() if line.split()])


def in_unit_square(points: Float[Tensor, "N 2"]) -> Float[Tensor, "N 2"]:
    """The points moved and scaled into the square that networks are trained on, both axes alike; float32."""
    low, high = points.amin(0), points.amax(0)
    return ((points - low) / (high - low).max().clamp_min(1e-300)).float()
