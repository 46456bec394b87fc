"""Scores of one class in one case: overlap, and distances of surfaces.

Absent from both masks → every score is NaN; absent from one → Dice, IoU and NSD are 0, distances are infinite.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

DISTANCES = ("HD95", "ASSD")


def compare(
    predicted: np.ndarray, truth: np.ndarray, spacing: Sequence[float], *, tolerance: float = 1.0
) -> dict[str, float]:
    """All scores of one class in one case.

    Args:
        predicted, truth: bool (Z, Y, X).
        spacing: mm.
        tolerance: distance in mm that NSD forgives.

    Returns: ``TP FP FN TN n_pred n_ref`` in voxels; ``Dice IoU NSD`` in [0, 1]; ``HD95 ASSD`` in mm; volumes in ml.
    Raises: ValueError if the shapes differ.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"compare: shapes {predicted.shape} and {truth.shape} differ")
    tp = int((predicted & truth).sum())
    fp, fn = int(predicted.sum()) - tp, int(truth.sum()) - tp
    union = tp + fp + fn
    voxel = float(np.prod(spacing)) / 1000
    distances = surface_distances(predicted, truth, spacing)
    return {
        "TP": tp,
        "FP": fp,
        "FN": fn,
        "TN": predicted.size - union,
        "n_pred": tp + fp,
        "n_ref": tp + fn,
        "Dice": 2 * tp / (union + tp) if union else float("nan"),
        "IoU": tp / union if union else float("nan"),
        **_of_distances(distances, tolerance),
        "ml_pred": (tp + fp) * voxel,
        "ml_ref": (tp + fn) * voxel,
    }


def surface_distances(
    predicted: np.ndarray, truth: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Distances in mm from each surface voxel of one mask to the nearest of the other, both ways; None if both empty.

    A surface voxel touches the outside through a face. If one mask is empty, distances to it are infinite.
    """
    from scipy import ndimage

    either = predicted | truth
    if not either.any():
        return None
    box = tuple(slice(max(0, at.min() - 1), at.max() + 2) for at in np.nonzero(either))
    # The border adds what a mask at the edge of the image touches: the outside.
    flat = predicted.shape[0] == 1
    border = [(0, 0) if flat and axis == 0 else (1, 1) for axis in range(3)]
    masks = [np.pad(mask[box], border) for mask in (predicted, truth)]
    structure = ndimage.generate_binary_structure(3, 1)
    if flat:
        structure = structure & (np.arange(3) == 1)[:, None, None]
    surfaces = [mask ^ ndimage.binary_erosion(mask, structure) for mask in masks]
    found = []
    for own, other in (surfaces, surfaces[::-1]):
        if not other.any():
            found.append(np.full(int(own.sum()), np.inf))
        else:
            distance: Any = ndimage.distance_transform_edt(~other, sampling=spacing)
            found.append(distance[own])
    return found[0], found[1]


def _of_distances(distances: tuple[np.ndarray, np.ndarray] | None, tolerance: float) -> dict[str, float]:
    if distances is None:
        return dict.fromkeys(("HD95", "ASSD", "NSD"), float("nan"))
    if any(not len(d) for d in distances):
        return {"HD95": float("inf"), "ASSD": float("inf"), "NSD": 0.0}
    joined = np.concatenate(distances)
    return {
        "HD95": float(max(np.percentile(d, 95) for d in distances)),
        "ASSD": float(joined.mean()),
        "NSD": float((joined <= tolerance).mean()),
    }
