"""Pictures of three-dimensional boxes: in all six cameras and in bird's-eye view.

Checked in: ``commands/test_ring3d.py``.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from torch import Tensor, nn

from detection.data.ring3d import CAMERAS, box_corners

LAYOUT = ("CAM_FRONT_LEFT", "CAM_FRONT", "CAM_FRONT_RIGHT", "CAM_BACK_LEFT", "CAM_BACK", "CAM_BACK_RIGHT")
COLORS = ("#ff922b", "#4dabf7", "#f06595", "#94d82d", "#b197fc", "#22b8cf", "#fcc419", "#ff8787", "#20c997", "#ced4da")
EDGES = (
    [(i, (i + 1) % 4) for i in range(4)] + [(4 + i, 4 + (i + 1) % 4) for i in range(4)] + [(i, 4 + i) for i in range(4)]
)
NEAR = 0.2  # meters: edges are cut off here
REACH = 32.0  # meters shown to each side in bird's-eye view
Array = NDArray[np.float64]


def projected_edges(boxes: Array, lidar2img: Array) -> list[list[Array]]:
    """Of every box (N, ≥ 7) the visible parts of its edges in a camera, each (2, 2) in pixels."""
    lines: list[list[Array]] = []
    for corners in box_corners(boxes[:, :7]):
        seen = np.concatenate([corners, np.ones((8, 1))], 1) @ lidar2img.T
        own = []
        for a, b in EDGES:
            p, q = seen[a], seen[b]
            if max(p[2], q[2]) <= NEAR:
                continue
            if min(p[2], q[2]) < NEAR:
                cut = p + (NEAR - p[2]) / (q[2] - p[2]) * (q - p)
                p, q = (cut, q) if p[2] < NEAR else (p, cut)
            own.append(np.stack([p[:2] / p[2], q[:2] / q[2]]))
        lines.append(own)
    return lines


def draw_sample(
    image: Float[Tensor, "K 3 Y X"],
    lidar2img: Float[Tensor, "K 4 4"],
    found: Mapping[str, Tensor],
    path: Path,
    *,
    classes: Sequence[str],
    truth: Mapping[str, Tensor] | None = None,
    threshold: float = 0.3,
) -> None:
    """Write one sample with its predictions (colored by class, at least ``threshold``) and truth (dashed, white).

    Args:
        found: boxes (N, ≥ 7), scores, labels. truth: boxes, labels.
    """
    keep = found["scores"] >= threshold
    boxes = found["boxes"][keep].double().numpy()
    labels = found["labels"][keep].tolist()
    scores = found["scores"][keep].tolist()
    true = truth["boxes"].double().numpy() if truth is not None else np.zeros((0, 7))
    figure = Figure(figsize=(15, 5.3), layout="constrained", facecolor="#212529")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 4, width_ratios=(1, 1, 1, 1.25))
    height, width = image.shape[2:]
    for place, name in enumerate(LAYOUT):
        camera = CAMERAS.index(name)
        axis = figure.add_subplot(grid[divmod(place, 3)])
        axis.imshow(image[camera].permute(1, 2, 0).clamp(0, 1).numpy())
        matrix = lidar2img[camera].double().numpy()
        for edges in projected_edges(true, matrix):
            for line in edges:
                axis.plot(*line.T, color="white", linewidth=0.8, linestyle=(0, (3, 2)))
        for edges, label in zip(projected_edges(boxes, matrix), labels, strict=True):
            for line in edges:
                axis.plot(*line.T, color=COLORS[label % len(COLORS)], linewidth=1.5)
        axis.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])
        axis.set_title(name.removeprefix("CAM_").replace("_", " ").lower(), fontsize=9, color="white")
    axis = figure.add_subplot(grid[:, 3])
    _draw_ground(axis, boxes, labels, scores, true)
    handles = [
        Line2D([], [], color=COLORS[i % len(COLORS)], label=name) for i, name in enumerate(classes) if i in labels
    ]
    handles.append(Line2D([], [], color="white", linestyle="--", label="truth"))
    axis.legend(handles=handles, loc="upper right", fontsize=8, facecolor="#343a40", labelcolor="white")
    figure.suptitle(f"{len(boxes)} boxes with a score of at least {threshold}", color="white", fontsize=10)
    figure.savefig(path, dpi=110, facecolor=figure.get_facecolor())


def _draw_ground(axis: Axes, boxes: Array, labels: Sequence[int], scores: Sequence[float], truth: Array) -> None:
    axis.set_facecolor("#343a40")
    for distance in range(10, int(REACH) + 1, 10):
        angle = np.linspace(0, 2 * np.pi, 120)
        axis.plot(distance * np.cos(angle), distance * np.sin(angle), color="#495057", linewidth=0.6)
    axis.plot(0, 0, marker="^", color="white", markersize=7)
    for corners in box_corners(truth[:, :7]):
        axis.plot(*corners[[0, 1, 2, 3, 0], :2].T, color="white", linewidth=0.8, linestyle=(0, (3, 2)))
    for box, corners, label, score in zip(boxes, box_corners(boxes[:, :7]), labels, scores, strict=True):
        color = COLORS[label % len(COLORS)]
        axis.plot(*corners[[0, 1, 2, 3, 0], :2].T, color=color, linewidth=1.6)
        front = (corners[0, :2] + corners[3, :2]) / 2
        axis.plot(*np.stack([box[:2], front]).T, color=color, linewidth=1.6)
        above = (box[0], corners[:, 1].max() + REACH / 100)
        axis.annotate(f"{score:.2f}", above, ha="center", va="bottom", fontsize=7, color="white")
    axis.set(xlim=(-REACH, REACH), ylim=(-REACH, REACH), aspect="equal")
    axis.tick_params(colors="white", labelsize=7)
    axis.set_xlabel("x, m (right)", color="white", fontsize=8)
    axis.set_ylabel("y, m (forward)", color="white", fontsize=8)


@torch.no_grad()
def draw_scenes(model: nn.Module, loader: Iterable[dict[str, Any]], path: Path) -> None:
    """The sample of the loader's first batch that has the most objects, for the end of a run."""
    batch = next(iter(loader))
    device = next(model.parameters()).device
    moved = {
        key: value.to(device) if isinstance(value, Tensor) else [part.to(device) for part in value]
        for key, value in batch.items()
    }
    found = model.predict(**moved)  # pyright: ignore[reportCallIssue]
    best = max(range(len(found)), key=lambda i: len(batch["boxes"][i]))
    draw_sample(
        batch["image"][best],
        batch["lidar2img"][best],
        found[best],
        path,
        classes=loader.dataset.metainfo["classes"],  # pyright: ignore[reportAttributeAccessIssue]
        truth={"boxes": batch["boxes"][best], "labels": batch["labels"][best]},
    )
