"""Where the regions of an image look: routing tables of every stage, and a picture of them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor

from .backbone import Stage
from .biformer import BiFormer
from .bilevel_routing import RoutedAttention


@dataclass(frozen=True)
class Routing:
    """The routing of one block for one image.

    Attributes:
        stage: 1…4.
        map_size: rows and columns of the token map.
        region: tokens per region (rows, columns); regions at the lower and right border may leave the map.
        table: (R, K) regions that each region reads, best first.
        weight: (R, K) their softmax weights.
    """

    stage: int
    map_size: tuple[int, int]
    region: tuple[int, int]
    table: Tensor
    weight: Tensor

    @property
    def columns(self) -> int:
        return -(-self.map_size[1] // self.region[1])

    def region_at(self, point: tuple[float, float]) -> int:
        """The region that holds a point, given as fractions of the image's height and width."""
        row, column = (min(int(f * size), size - 1) // side for f, size, side in zip(point, self.map_size, self.region))  # noqa: B905
        return row * self.columns + column

    def box(self, index: int) -> tuple[float, float, float, float]:
        """Left, top, width and height of a region as fractions of the image, cut at its border."""
        top, left = (index // self.columns) * self.region[0], (index % self.columns) * self.region[1]
        height, width = self.map_size
        bottom, right = min(top + self.region[0], height), min(left + self.region[1], width)
        return left / width, top / height, max(0, right - left) / width, max(0, bottom - top) / height


@torch.no_grad()
def routings(model: BiFormer, image: Tensor) -> list[Routing]:
    """The routing of the last block of each stage that routes, for one image (C, Y, X)."""
    found: list[Routing] = []
    handles = []
    for number, stage in enumerate(model.stages, start=1):
        assert isinstance(stage, Stage)
        attn: Any = stage.blocks[-1].attn
        if isinstance(attn, RoutedAttention):

            def keep(module: RoutedAttention, inputs: tuple[Tensor], number: int = number) -> None:
                x = inputs[0]
                _, region, table, weight = module.route(x)
                size = (x.shape[1], x.shape[2])
                found.append(Routing(number, size, region, table[0, 0].cpu(), weight[0, 0].cpu()))

            handles.append(attn.register_forward_pre_hook(keep))
    try:
        model(image[None])
    finally:
        for handle in handles:
            handle.remove()
    return found


def draw_routing(
    image: Image.Image,
    found: Sequence[Routing],
    scores: Sequence[tuple[str, float]],
    point: tuple[float, float],
    path: Path,
) -> None:
    """A PNG: the image with its best classes, then per stage the chosen region (framed) and the regions it reads.

    Args:
        scores: class names and probabilities, best first.
        point: fractions of height and width; the region of each stage that holds it is drawn.
    """
    figure = Figure(figsize=(2.9 * (len(found) + 1), 3.9))
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(found) + 1, squeeze=False)[0]
    pixels = np.asarray(image.convert("RGB"))
    high, wide = pixels.shape[:2]
    axes[0].imshow(pixels, interpolation="nearest")
    axes[0].plot(point[1] * wide - 0.5, point[0] * high - 0.5, "+", color="#d6336c", markersize=14, markeredgewidth=2.5)
    lines = [f"{name[:22]}  {100 * probability:.1f} %" for name, probability in scores[:5]]
    axes[0].set_xlabel("\n".join(lines), fontsize=9, loc="left")
    axes[0].set_title("image", fontsize=10, loc="left")
    for axis, routing in zip(axes[1:], found, strict=True):
        chosen = routing.region_at(point)
        table, weight = routing.table[chosen].tolist(), routing.weight[chosen].tolist()
        light = np.full((high, wide, 1), 0.22)
        for region, share in zip(table, weight, strict=True):
            left, top, width, height = routing.box(region)
            rows = slice(round(top * high), round((top + height) * high))
            columns = slice(round(left * wide), round((left + width) * wide))
            light[rows, columns] = 0.55 + 0.45 * share / max(weight)
        # Darkness falls on gray, so that black images show their regions too.
        axis.imshow(np.uint8(light * (0.75 * pixels + 64) * 1.0), interpolation="nearest")
        rows_of_regions = -(-routing.map_size[0] // routing.region[0])
        for line in range(1, routing.columns):
            axis.axvline(line * routing.region[1] / routing.map_size[1] * wide - 0.5, color="white", lw=0.4, alpha=0.5)
        for line in range(1, rows_of_regions):
            axis.axhline(line * routing.region[0] / routing.map_size[0] * high - 0.5, color="white", lw=0.4, alpha=0.5)
        left, top, width, height = routing.box(chosen)
        corner = (left * wide - 0.5, top * high - 0.5)
        axis.add_patch(Rectangle(corner, width * wide, height * high, fill=False, edgecolor="#d6336c", lw=2.5))
        axis.set_title(
            f"stage {routing.stage}: {len(table)} of {len(routing.table)} regions read", fontsize=10, loc="left"
        )
    for axis in axes:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=130, bbox_inches="tight")
