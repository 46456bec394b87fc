"""Pictures of volumes with their labels: three planes, contours, and letters that say which side is which."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from attn_core.lettering import lettered
from medical_seg.data.volumes import Volume

COLORS = ["#4dabf7", "#fab005", "#e64980", "#37b24d", "#be4bdb", "#15aabf", "#fa5252", "#94d82d"]
SIDE = 10.9  # inches that a picture is wide or high at most; at 100 dots an inch a report of 1,100 px holds it
HEADER, FOOTER, GAP = 0.62, 0.42, 0.08


class Plane(NamedTuple):
    """A way to cut: the axis that is fixed; the patient's sides at the left, right, bottom and top of the picture."""

    name: str
    axis: int
    sides: tuple[str, str, str, str]


PLANES = (
    Plane("axial", 0, ("L", "R", "P", "A")),
    Plane("coronal", 1, ("L", "R", "I", "S")),
    Plane("sagittal", 2, ("P", "A", "I", "S")),
)


def draw_planes(
    volume: Volume, masks: Sequence[tuple[str, np.ndarray]], classes: Sequence[str], path: Path, *, case: str = ""
) -> None:
    """Three planes through the middle of what is labelled (one, for a picture), the image and each mask beside it.

    Axes run from the patient's left to right, back to front and foot to head; letters at the borders say so.

    Args:
        volume: the image; its first channel is drawn.
        masks: titles and labels (Z, Y, X).
        classes: names, background first.
        path: the PNG file, at most 1,100 pixels wide and high.
        case: its name, for the heading.
    """
    with lettered([*classes, case]) as (*names, heading):
        _draw_figure(volume, masks, names, path, case="" if heading == f"class {len(classes)}" else heading)


def _draw_figure(
    volume: Volume, masks: Sequence[tuple[str, np.ndarray]], classes: Sequence[str], path: Path, *, case: str
) -> None:
    image = volume.data[0]
    labelled = next((mask for _, mask in masks if mask.any()), masks[0][1])
    planes = PLANES[:1] if image.shape[0] == 1 else PLANES
    columns = 1 + len(masks)
    sizes = [_millimeters(volume, plane) for plane in planes]
    scale = _scale(sizes, columns)
    width = columns * max(w for w, _ in sizes) * scale + (columns + 1) * GAP
    width = max(width, 3.2)
    height = sum(h for _, h in sizes) * scale + (len(planes) + 1) * GAP + HEADER + FOOTER
    figure = Figure(figsize=(width, height), facecolor="black")
    FigureCanvasAgg(figure)
    low, high = np.percentile(image[tuple(slice(None, None, max(1, n // 64)) for n in image.shape)], (1, 99.5))
    window = {"cmap": "gray", "vmin": low, "vmax": max(high, low + 1e-6)}
    top = height - HEADER
    for plane, (w, h) in zip(planes, sizes, strict=True):
        index = _middle(labelled, plane.axis)
        for column, mask in enumerate([None, *(mask for _, mask in masks)]):
            left = (width - columns * (w * scale + GAP) + GAP) / 2 + column * (w * scale + GAP)
            place = (left / width, (top - h * scale) / height, w * scale / width, h * scale / height)
            axes: Any = figure.add_axes(place)
            _draw_plane(axes, volume, plane, index, mask, window, len(classes))
            if plane is planes[0]:
                title = "image" if mask is None else masks[column - 1][0]
                empty = mask is not None and not mask.any()
                axes.set_title(f"{title}: nothing" if empty else title, fontsize=10, color="white", pad=3)
        top -= h * scale + GAP
    _text(figure, 0.5, 1 - 0.16 / height, _shortened(case, int(width * 11)), ha="center", va="center", fontsize=11)
    colors = [COLORS[k % len(COLORS)] for k in range(max(0, len(classes) - 1))]
    named = zip(colors, classes[1:], strict=True)
    handles = [Line2D([], [], color=color, linewidth=2.5, label=name) for color, name in named]
    figure.legend(handles=handles, loc="lower center", ncols=min(5, max(1, len(handles))), fontsize=9,
                  labelcolor="white", facecolor="black", edgecolor="black", borderaxespad=0.2)  # fmt: skip
    figure.savefig(path, dpi=100)


def _draw_plane(
    axes: Any, volume: Volume, plane: Plane, index: int, mask: np.ndarray | None, window: dict[str, Any], classes: int
) -> None:
    is_picture = volume.orientation is None and volume.data.shape[1] == 1
    cut = np.take(volume.data[0], index, plane.axis).astype(float)
    rows, columns = cut.shape
    # Feet and back of the head lie at the bottom; rows of a picture run downwards.
    origin = "upper" if is_picture else "lower"
    axes.imshow(cut, origin=origin, aspect="auto", **window)
    if mask is not None:
        # With a border of background, so that contours close at the edge of the image.
        labels = np.pad(np.take(mask, index, plane.axis), 1)
        x, y = np.arange(-1, columns + 1), np.arange(-1, rows + 1)
        for k in range(1, classes):
            inside = labels == k
            if inside.any():
                color = COLORS[(k - 1) % len(COLORS)]
                axes.contourf(x, y, inside, levels=(0.5, 1.5), colors=[color], alpha=0.22)
                axes.contour(x, y, inside, levels=(0.5,), colors=[color], linewidths=1.6)
        axes.set_xlim(-0.5, columns - 0.5)
        axes.set_ylim(*((rows - 0.5, -0.5) if is_picture else (-0.5, rows - 0.5)))
    axes.set_axis_off()
    if is_picture:
        return
    size = volume.data.shape[1 + plane.axis]
    _text(axes, 0.02, 0.985, f"{plane.name}, slice {index + 1} of {size}", ha="left", va="top", fontsize=9)
    left, right, bottom, top = plane.sides
    for x, y, letter in ((0.02, 0.5, left), (0.98, 0.5, right), (0.5, 0.02, bottom), (0.5, 0.93, top)):
        _text(axes, x, y, letter, ha="left" if x < 0.1 else "right" if x > 0.9 else "center",
              va="bottom" if y < 0.1 else "top" if y > 0.9 else "center", fontsize=11)  # fmt: skip


def _text(where: Any, x: float, y: float, text: str, **style: Any) -> None:
    place = {} if isinstance(where, Figure) else {"transform": where.transAxes}
    where.text(x, y, text, color="white", path_effects=[withStroke(linewidth=2, foreground="black")],
               **place, **style)  # fmt: skip


def _millimeters(volume: Volume, plane: Plane) -> tuple[float, float]:
    """Width and height of a plane; one side is at least a sixth of the other, so that thin stacks can be seen."""
    high, wide = (volume.data.shape[1 + axis] * volume.spacing[axis] for axis in range(3) if axis != plane.axis)
    return max(wide, high / 6), max(high, wide / 6)


def _scale(sizes: Sequence[tuple[float, float]], columns: int) -> float:
    """Inches of a millimeter, the same in all planes."""
    across = (SIDE - (columns + 1) * GAP) / (columns * max(w for w, _ in sizes))
    down = (SIDE - HEADER - FOOTER - (len(sizes) + 1) * GAP) / sum(h for _, h in sizes)
    return min(across, down)


def _shortened(text: str, letters: int) -> str:
    return text if len(text) <= letters else f"…{text[1 - letters :]}"


def _middle(mask: np.ndarray, axis: int) -> int:
    """The plane that has half of what is labelled on either side; the middle one of an empty mask."""
    counts = [np.count_nonzero(np.take(mask, index, axis)) for index in range(mask.shape[axis])]
    total = np.cumsum(counts)
    return int(np.searchsorted(total, total[-1] / 2)) if total[-1] else mask.shape[axis] // 2
