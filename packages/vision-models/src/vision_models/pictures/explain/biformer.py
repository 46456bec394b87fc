"""Where the regions of an image look: routing tables of every stage, and a panel of each."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vision_models.layers.bilevel_routing import RoutedAttention
from vision_models.models.biformer import BiFormer
from vision_models.pictures.explain.panel import Panel, inputs_of


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
        """Number of regions side by side; the last may be cut by the border of the map."""
        return -(-self.map_size[1] // self.region[1])

    def region_at(self, point: tuple[float, float]) -> int:
        """The region that holds a point, given as fractions of the image's height and width."""
        row, column = (min(int(f * size), size - 1) // side for f, size, side in zip(point, self.map_size, self.region))  # noqa: B905
        return row * self.columns + column

    def box(self, index: int) -> tuple[int, int, int, int]:
        """Top, left, height and width of a region in tokens."""
        row, column = divmod(index, self.columns)
        return row * self.region[0], column * self.region[1], *self.region


@torch.no_grad()
def routings(model: BiFormer, image: Tensor) -> list[Routing]:
    """The routing of the last block of each stage that routes, for one image (C, Y, X)."""
    last: dict[Any, int] = {}
    for number, stage in enumerate(model.stages, start=1):
        attn: Any = stage.blocks[-1].attn  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
        if isinstance(attn, RoutedAttention):
            last[attn] = number
    found = []
    for attn, x in inputs_of(model, list(last), image).items():
        _, region, table, weight = attn.route(x)  # pyright: ignore[reportCallIssue]
        found.append(Routing(last[attn], (x.shape[1], x.shape[2]), region, table[0, 0].cpu(), weight[0, 0].cpu()))
    return found


def panels(net: BiFormer, image: Tensor, point: tuple[float, float]) -> list[list[Panel]]:
    """The region that holds the point (framed) and the regions it reads; brighter is more."""
    columns = []
    for routing in routings(net, image):
        chosen = routing.region_at(point)
        table, weight = routing.table[chosen].tolist(), routing.weight[chosen].tolist()
        light = torch.full(routing.map_size, 0.22)
        for region, share in zip(table, weight, strict=True):
            top, left, height, width = routing.box(region)
            light[top : top + height, left : left + width] = 0.55 + 0.45 * share / max(weight)
        title = f"stage {routing.stage}: {len(table)} of {len(routing.table)} regions read"
        columns.append([Panel(title, light, routing.region, [routing.box(chosen)])])
    return columns
