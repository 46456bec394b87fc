"""Pictures of what a network attends to, one module for each family.

A network of ``vision_models.models.<family>`` is explained by ``vision_models.pictures.explain.<family>``, or by
``stages`` where that file does not exist. It has one function:

    panels(net, image, point) -> columns

with the prepared image (C, Y, X), the point as fractions of height and width, and one column of :class:`Panel` for
each stage shown. The layout and the picture itself are drawn here.
"""

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from attn_core.lettering import lettered
from vision_models.backbone import StagedBackbone
from vision_models.pictures.explain import stages
from vision_models.pictures.explain.panel import Panel, draw_panel, enlarged

__all__ = ["Panel", "draw", "panels_of"]

Panels = Callable[[Any, Tensor, tuple[float, float]], list[list[Panel]]]


def panels_of(net: nn.Module) -> Panels | None:
    """The function that explains ``net``, found by its class; None if it is no backbone of ours."""
    for cls in type(net).__mro__:
        parent, _, family = cls.__module__.rpartition(".")
        if parent == "vision_models.models" and importlib.util.find_spec(f"{__name__}.{family}") is not None:
            return importlib.import_module(f"{__name__}.{family}").panels
    return stages.panels if isinstance(net, StagedBackbone) else None


@torch.no_grad()
def draw(
    net: nn.Module,
    image: Tensor,
    picture: Image.Image,
    scores: Sequence[tuple[str, float]],
    point: tuple[float, float],
    path: Path,
) -> None:
    """A PNG: the picture with its best classes, then one column of panels for each stage.

    Args:
        net: in eval mode, of a family that :func:`panels_of` knows.
        image: (C, Y, X), what the network sees of ``picture``.
        scores: class names and probabilities, best first.
        point: fractions of height and width; what is shown belongs to the token or region there.

    Raises:
        ValueError: no module explains the family of ``net``, or its blocks have nothing to show.
    """
    panels = panels_of(net)
    if panels is None:
        raise ValueError(f"explain.draw: no picture is known for {type(net).__name__}; pass --no-explain")
    columns = panels(net, image, point)
    if not any(columns):
        raise ValueError(f"explain.draw: this {type(net).__name__} has no block that attends; pass --no-explain")
    with lettered([name for name, _ in scores[:5]]) as names:
        _draw(columns, enlarged(picture), [(n, p) for n, (_, p) in zip(names, scores, strict=False)], point, path)


def _draw(
    columns: list[list[Panel]],
    pixels: np.ndarray,
    scores: Sequence[tuple[str, float]],
    point: tuple[float, float],
    path: Path,
) -> None:
    rows = max(map(len, columns))
    tall = 2.9 * (1 if rows > 1 else pixels.shape[0] / pixels.shape[1])
    figure = Figure(figsize=(2.9 * (len(columns) + 1), (tall + 0.3) * rows + 0.7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(columns) + 1, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    first = axes[0, 0]
    first.set_axis_on()
    first.imshow(pixels, interpolation="nearest")
    high, wide = pixels.shape[:2]
    first.plot(point[1] * wide - 0.5, point[0] * high - 0.5, "+", color="#d6336c", markersize=14, markeredgewidth=2.5)
    lines = [f"{name[:22]}  {100 * probability:.1f} %" for name, probability in scores]
    first.set_xlabel("\n".join(lines), fontsize=9, loc="left")
    first.set_title("image", fontsize=10, loc="left")
    first.set_xticks([])
    first.set_yticks([])
    for x, column in enumerate(columns, start=1):
        for y, panel in enumerate(column):
            draw_panel(axes[y, x], panel, pixels)
    figure.savefig(path, dpi=110)
