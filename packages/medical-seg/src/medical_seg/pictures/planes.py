"""Pictures of volumes with their labels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from medical_seg.data.volumes import Volume

COLORS = ["#4dabf7", "#fab005", "#e64980", "#37b24d", "#be4bdb", "#15aabf", "#fa5252", "#94d82d"]
PLANES = (("axial", 0), ("coronal", 1), ("sagittal", 2))


def draw_planes(volume: Volume, masks: Sequence[tuple[str, np.ndarray]], classes: Sequence[str], path: Path) -> None:
    """Three planes through the middle of what is labelled (one, for a picture), the image and each mask beside it.

    Args:
        volume: the image; its first channel is drawn.
        masks: titles and labels (Z, Y, X).
        classes: names, background first.
        path: the PNG file.
    """
    image = volume.data[0]
    center = [_middle(masks[0][1], axis) for axis in range(3)]
    planes = PLANES[:1] if image.shape[0] == 1 else PLANES
    columns = 1 + len(masks)
    figure = Figure(figsize=(3.2 * columns, 3.2 * len(planes) + 0.7), layout="constrained", facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(planes), columns, squeeze=False)
    low, high = np.percentile(image[tuple(slice(None, None, max(1, n // 64)) for n in image.shape)], (1, 99.5))
    shown = (*COLORS * (1 + len(classes) // len(COLORS)),)[: max(1, len(classes) - 1)]
    for number, (row, (name, axis)) in enumerate(zip(axes, planes, strict=True)):
        rest = [a for a in range(3) if a != axis]
        aspect = volume.spacing[rest[0]] / volume.spacing[rest[1]]
        for column, (title, mask) in zip(row, [(name, None), *masks], strict=True):
            plane = np.take(image, int(center[axis]), axis).astype(float)
            # Feet and back of the head lie at the bottom; rows of a picture run downwards.
            origin = "lower" if len(planes) == 3 else "upper"
            column.imshow(plane, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin=origin, aspect=aspect)
            if mask is not None:
                labels = np.take(mask, int(center[axis]), axis)
                column.imshow(
                    np.ma.masked_equal(labels, 0),
                    cmap=ListedColormap(list(shown)),
                    vmin=0.5,
                    vmax=len(shown) + 0.5,
                    alpha=0.55,
                    origin=origin,
                    aspect=aspect,
                    interpolation="nearest",
                )
            if number == 0 or mask is None:
                column.set_title(title, fontsize=10, color="white")
            column.set_axis_off()
    handles = [Patch(color=color, label=label) for color, label in zip(shown, classes[1:], strict=False)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, max(1, len(handles))), fontsize=9,
                  labelcolor="white", facecolor="black", edgecolor="black")  # fmt: skip
    figure.savefig(path, dpi=110)


def _middle(mask: np.ndarray, axis: int) -> int:
    """The plane that has half of what is labelled on either side; the middle one of an empty mask."""
    counts = [np.count_nonzero(np.take(mask, index, axis)) for index in range(mask.shape[axis])]
    total = np.cumsum(counts)
    return int(np.searchsorted(total, total[-1] / 2)) if total[-1] else mask.shape[axis] // 2
