"""``predictions.png`` of a run on slides: the confusion matrix, and where the network looked."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from attn_core.lettering import lettered
from medical_seg.slides.heatmap import painted, shades, side_of_patches
from medical_seg.slides.task import SlideTask

MAPS = 3  # slides that are drawn, of different classes where possible


@torch.no_grad()
def draw_predictions(model: nn.Module, loader: Iterable[dict[str, Any]], path: Path) -> None:
    """Counts of true and predicted classes, and heat maps of up to three slides with coordinates."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    assert isinstance(model, SlideTask)
    data_set: Any = loader.dataset  # pyright: ignore[reportAttributeAccessIssue]
    classes = data_set.metainfo["classes"]
    device = next(model.parameters()).device
    counts = np.zeros((len(classes), len(classes)), dtype=int)
    chosen: dict[int, tuple[str, np.ndarray, str]] = {}
    for index in range(len(data_set)):
        item = data_set[index]
        found = model.net(item["features"][None].to(device))
        label, best = int(item["label"]), int(found.logits[0].argmax())
        counts[label, best] += 1
        name, places, side = data_set.place(index)
        if places is not None and label not in chosen and len(chosen) < MAPS:
            values = model.net.importance(found)[0].cpu().double().numpy()
            chosen[label] = name, _map(places, side_of_patches(places, side), values), classes[best]
    with lettered([*classes, *(name for name, _, _ in chosen.values())]) as shown:
        names = shown[: len(classes)]
        figure = Figure(figsize=(min(11.0, 4.2 + 3.2 * len(chosen)), 3.9), layout="constrained")
        FigureCanvasAgg(figure)
        axes: Any = np.atleast_1d(figure.subplots(1, 1 + len(chosen)))
        _draw_counts(axes[0], counts, names)
        for axis, (label, (_, shade, best)), name in zip(axes[1:], chosen.items(), shown[len(classes) :], strict=True):
            axis.imshow(np.ma.masked_invalid(shade), cmap="inferno", vmin=0, vmax=1, interpolation="nearest")
            axis.set_axis_off()
            axis.set_title(f"{name}\ntrue {names[label]}, found {names[classes.index(best)]}", fontsize=9)
        figure.savefig(path, dpi=100, bbox_inches="tight")


def _map(places: np.ndarray, side: float, values: np.ndarray) -> np.ndarray:
    places = places - places.min(0)
    step = max(side, float((places.max(0) + side).max()) / 400)
    width, height = (int(np.ceil(x)) for x in (places.max(0) + side) / step)
    return painted(places, side, shades(values, "rank"), step, (height, width))


def _draw_counts(axis: Any, counts: np.ndarray, names: list[str]) -> None:
    axis.imshow(counts, cmap="Blues")
    for row, column in np.ndindex(counts.shape):
        dark = counts[row, column] > counts.max() / 2
        axis.text(column, row, counts[row, column], ha="center", va="center", color="white" if dark else "black")
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right")
    axis.set_yticks(range(len(names)), names)
    axis.set(xlabel="found", ylabel="true")
