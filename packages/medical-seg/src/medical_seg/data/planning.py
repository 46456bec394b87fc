"""From a folder to settings: what the images are like, and the spacing, window and scaling that follow."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from medical_seg.data.folders import Folder, read_case

WINDOW_VOXELS = 64**3
MOST_VOXELS = 512**3


@dataclass(frozen=True)
class Plan:
    """Settings of a training.

    Attributes:
        spacing: mm along Z, Y, X: the median of all cases. None resizes each case to one window.
        window: voxels along Z, Y, X.
        scaling: a rule per channel, as of `measure_scaling`.
        grid: median grid at that spacing.
        voxels: of each label.
        empty: cases without foreground, such as healthy controls.
        thick: slices are at least three times as thick as their pixels are wide, or it is pictures; augmentation then
            turns them in their plane only.
    """

    spacing: tuple[float, ...] | None
    window: tuple[int, ...]
    scaling: tuple[Any, ...]
    grid: tuple[int, ...]
    voxels: tuple[int, ...]
    empty: int
    thick: bool


def make_plan(
    folder: Folder,
    divisor_of: Callable[[bool], int],
    window: Sequence[int] | None = None,
    *,
    planar: bool = False,
    whole: bool = False,
) -> Plan:
    """Read every case once.

    Args:
        folder: the data.
        divisor_of: what the network's window must be divisible by, given whether it is fed pictures.
        window: None chooses the median grid, cut at its longest axis until 64³ voxels are left (256² of a picture).
        planar: the network reads pictures only.
        whole: resize each case to one window instead of cutting windows from it.

    Raises: ValueError for a case that cannot be used, or a window of the wrong length or divisibility.
    """
    spacings, extents, values, empty = [], [], [[] for _ in folder.channels], 0
    voxels = np.zeros(folder.labels, dtype=int)
    for case in folder.cases:
        image, label = read_case(folder, case)
        spacings.append(image.spacing)
        extents.append(np.array(image.grid) * image.spacing)
        voxels += np.bincount(label[label < folder.labels].ravel(), minlength=folder.labels)
        inside = (label > 0) & (label != folder.ignore)
        empty += not inside.any()
        for channel, kept in zip(image.data, values, strict=True):
            drawn = channel[inside]
            kept.append(np.random.default_rng(0).choice(drawn, min(len(drawn), 10_000), replace=False))
    if empty == len(folder.cases):
        raise ValueError(f"{folder.path}: no case has any foreground; there is nothing to learn")
    spacing = np.median(spacings, axis=0)
    grid = np.maximum(1, np.round(np.median(extents, axis=0) / spacing)).astype(int)
    pictures = bool(planar or grid[0] == 1)
    divisor = divisor_of(pictures)
    chosen = _window(grid, divisor, planar=pictures) if window is None else tuple(window)  # pyright: ignore[reportArgumentType]
    if len(chosen) != 3 or min(chosen) < 1:
        raise ValueError(f"--window: expected three sizes Z Y X such as 32,64,64, got {window}")
    if np.prod(chosen, dtype=object) > MOST_VOXELS:
        raise ValueError(f"--window: {'×'.join(map(str, chosen))} are more than {MOST_VOXELS:,} voxels")
    for size in chosen[1:] if chosen[0] == 1 else chosen:
        if size % divisor:
            raise ValueError(f"--window: the network halves its grid until {divisor} divides it, {size} does not fit")
    rules = []
    for name, kept in zip(folder.channels, values, strict=True):
        if name.upper() != "CT":
            rules.append("zscore")
            continue
        drawn = np.concatenate(kept)
        rules.append(tuple(float(v) for v in (*np.percentile(drawn, (0.5, 99.5)), drawn.mean(), drawn.std())))
    kept = None if whole else tuple(map(float, spacing))
    thick = bool(chosen[0] == 1 or spacing[0] >= 3 * min(spacing[1:]))
    return Plan(kept, chosen, tuple(rules), tuple(map(int, grid)), tuple(map(int, voxels)), empty, thick)


def healthy(empty: int) -> str:
    """Part of a line about cases without foreground; nothing if there are none."""
    return f", {empty} of them without foreground (healthy controls)" if empty else ""


def _window(grid: Sequence[int], divisor: int, *, planar: bool) -> tuple[int, ...]:
    window = [max(divisor, -(-size // divisor) * divisor) for size in grid]
    limit = WINDOW_VOXELS
    if planar:
        window[0], limit = 1, 256**2
    while np.prod(window) > limit and max(window) > divisor:
        window[int(np.argmax(window))] -= divisor
    return tuple(map(int, window))
