"""Seeded cases of ``neighborhood_scores``."""

from typing import Any

import torch
from torch import Tensor

from attn_core import neighborhood_scores
from attn_core.testing.harness import Case, tensor


def _case(
    name: str,
    grid: tuple[int, ...],
    kernel: int | tuple[int, ...],
    *,
    batch: int = 2,
    heads: int = 3,
    width: int = 4,
    rpb: bool = False,
    strided: bool = False,
    varied: bool = False,
    **options: Any,
) -> Case:
    def build(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
        def data() -> Tensor:
            if strided:  # heads split from a wide projection, every second column
                wide = tensor(dtype, device, batch, *grid, heads, 2 * width, gradient=False)
                return wide[..., ::2].movedim(-2, 1).requires_grad_()
            return tensor(dtype, device, batch, heads, *grid, width)

        kwargs = dict(options)
        if rpb:
            sizes = (kernel,) * len(grid) if isinstance(kernel, int) else kernel
            kwargs["rpb"] = tensor(dtype, device, heads, *(2 * size - 1 for size in sizes))
        return [data(), data(), kernel], kwargs

    return Case(neighborhood_scores, name, build, varied)


def cases() -> list[Case]:
    """Grids of one to three axes, every border, causal axes, dilation; windows larger than the grid; no image."""
    case = _case
    return [
        case("plain", (6, 5), 3, varied=True),
        case("sequence, relative bias", (17,), 5, rpb=True),
        case("volume, causal axis", (4, 3, 5), (3, 2, 3), is_causal=(False, True, False)),
        case("dilation, relative bias", (11, 7), (3, 2), dilation=(3, 2), rpb=True),
        case("causal, dilation", (19,), 4, is_causal=True, dilation=2),
        case("truncated, relative bias", (6, 7), (3, 4), border="truncated", rpb=True, dilation=2, varied=True),
        case("zero, window larger than the grid", (4, 3), 7, border="zero"),
        case("window as large as the grid", (5, 7), (5, 7)),
        case("many tiles", (37, 3), (3, 3), heads=1, rpb=True),
        case("more heads than one part holds", (21, 20), 7, heads=4, width=16),
        case("one cell", (1,), 1),
        case("strided", (6, 5), 3, strided=True, rpb=True),
        case("no image", (4, 4), 3, batch=0, rpb=True),
    ]
