"""Seeded cases of ``deformable_attention``."""

from typing import Any

import torch

from attn_core import deformable_attention
from attn_core.testing.harness import Case, tensor


def _case(
    name: str,
    shapes: tuple[tuple[int, int], ...],
    *,
    batch: int = 2,
    queries: int = 5,
    heads: int = 2,
    width: int = 4,
    points: int = 3,
    bins: int = 0,
    spread: float = 1.2,
    strided: bool = False,
    varied: bool = False,
) -> Case:
    def build(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        cells = sum(h * w for h, w in shapes)
        levels = len(shapes)
        if strided:  # heads first in memory, every second column
            value = tensor(dtype, device, batch, heads, cells, 2 * width, gradient=False)
            value = value[..., ::2].transpose(1, 2).requires_grad_()
        else:
            value = tensor(dtype, device, batch, cells, heads, width)
        size = (batch, queries, heads, levels, points, 3 if bins else 2)
        places = torch.rand(*size, dtype=torch.float64) * spread - (spread - 1) / 2
        locations = places.to(device, exact).requires_grad_()
        args = [value, shapes, locations, tensor(dtype, device, *size[:-1])]
        return [*args, tensor(dtype, device, batch, cells, heads, bins)] if bins else args, {}

    return Case(deformable_attention, name, build, varied)


def cases() -> list[Case]:
    """One to four maps, points outside of them, depth, layouts; and nothing at all."""
    case = _case
    return [
        case("plain", ((5, 4), (3, 2)), varied=True),
        case("one map", ((6, 7),)),
        case("one cell", ((1, 1),)),
        case("four maps", ((7, 5), (4, 3), (2, 2), (1, 1)), width=3),
        case("one image, one head", ((4, 5),), batch=1, heads=1),
        case("odd width", ((4, 5), (2, 3)), width=7, heads=3),
        case("width 1, one point", ((4, 5),), width=1, points=1),
        case("most samples outside", ((4, 5), (2, 2)), spread=6.0),
        case("strided", ((4, 5), (2, 2)), strided=True, varied=True),
        case("many queries", ((3, 3),), queries=41),
        case("depth", ((5, 4), (3, 2)), bins=6, varied=True),
        case("one depth bin", ((4, 4),), bins=1),
        case("depth, most samples outside", ((3, 4),), bins=3, spread=4.0),
        case("depth, strided", ((3, 4),), bins=5, strided=True, width=5),
        case("no image", ((4, 5),), batch=0),
        case("no query", ((4, 5),), queries=0, bins=3),
        case("no point", ((4, 5),), points=0),
    ]
