"""Seeded cases of ``neighborhood_values``."""

import math
from typing import Any

import torch

from attn_core import neighborhood_values
from attn_core.testing.harness import Case, tensor


def _case(
    name: str,
    grid: tuple[int, ...],
    kernel: int | tuple[int, ...],
    *,
    batch: int = 2,
    heads: int = 3,
    width: int = 4,
    strided: bool = False,
    varied: bool = False,
    **options: Any,
) -> Case:
    sizes = (kernel,) * len(grid) if isinstance(kernel, int) else kernel

    def build(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
        slots = math.prod(sizes)
        if strided:  # heads side by side, every second slot
            p = tensor(dtype, device, batch, *grid, heads, 2 * slots, gradient=False)[..., ::2].movedim(-2, 1)
            p.requires_grad_()
        else:
            p = tensor(dtype, device, batch, heads, *grid, slots)
        return [p, tensor(dtype, device, batch, heads, *grid, width), kernel], dict(options)

    return Case(neighborhood_values, name, build, varied)


def cases() -> list[Case]:
    """Grids of one to three axes, every border, causal axes, dilation; windows larger than the grid; no image."""
    case = _case
    return [
        case("plain", (6, 5), 3, varied=True),
        case("sequence", (17,), 5),
        case("volume, causal axis", (4, 3, 5), (3, 2, 3), is_causal=(False, True, False)),
        case("causal, dilation", (19,), 4, is_causal=True, dilation=2, varied=True),
        case("truncated, dilation", (6, 7), (3, 4), border="truncated", dilation=2, varied=True),
        case("zero, window larger than the grid", (4, 3), 7, border="zero"),
        case("many tiles", (37, 3), (3, 3), heads=1),
        case("more heads than one part holds", (21, 20), 7, heads=4, width=16),
        case("one cell", (1,), 1),
        case("strided", (6, 5), 3, strided=True),
        case("no image", (4, 4), 3, batch=0),
    ]
