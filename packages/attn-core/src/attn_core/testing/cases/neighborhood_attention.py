"""Seeded cases of ``neighborhood_attention``."""

from typing import Any

import torch
from torch import Tensor

from attn_core import neighborhood_attention
from attn_core.testing.harness import Case, tensor


def _case(
    name: str,
    grid: tuple[int, ...],
    kernel: int | tuple[int, ...],
    *,
    batch: int = 2,
    heads: int = 2,
    width: int = 8,
    value_width: int = 8,
    rpb: bool = False,
    strided: bool = False,
    varied: bool = False,
    **options: Any,
) -> Case:
    def build(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
        def data(width: int) -> Tensor:
            if strided:  # heads split from a wide projection, every second column
                wide = tensor(dtype, device, batch, *grid, heads, 2 * width, gradient=False)
                return wide[..., ::2].movedim(-2, 1).requires_grad_()
            return tensor(dtype, device, batch, heads, *grid, width)

        kwargs = dict(options)
        args = [data(width), data(width), data(value_width)]
        if rpb:
            sizes = (kernel,) * len(grid) if isinstance(kernel, int) else kernel
            kwargs["rpb"] = tensor(dtype, device, heads, *(2 * size - 1 for size in sizes))
        return [*args, kernel], kwargs

    return Case(neighborhood_attention, name, build, varied)


def cases() -> list[Case]:
    """One to three axes, dilation, stride, causality, relative bias, truncated windows; and nothing at all."""
    case = _case
    return [
        case("plain", (6, 5), 3, varied=True),
        case("sequence", (17,), 5),
        case("volume", (4, 3, 5), (3, 2, 3)),
        case("even window", (9, 8), (4, 2)),
        case("window of one cell", (5, 4), 1),
        case("window as large as the grid", (5, 7), (5, 7)),
        case("dilation", (11, 7), (3, 2), dilation=(3, 2), varied=True),
        case("stride", (13,), 5, stride=3),
        case("stride and dilation", (14, 9), (4, 3), stride=(2, 3), dilation=(3, 2)),
        case("causal", (19,), 4, is_causal=True),
        case("one causal axis", (6, 7), 3, is_causal=(True, False), stride=(2, 1)),
        case("causal, dilation, stride", (17,), 3, is_causal=True, stride=2, dilation=2),
        case("relative bias", (7, 6), (3, 4), rpb=True),
        case("relative bias, dilation, causal axis", (9, 8), 3, rpb=True, dilation=2, is_causal=(False, True)),
        case("truncated", (6, 7), (3, 4), border="truncated"),
        case("truncated, window larger than the grid", (4, 3), 7, border="truncated"),
        case("truncated, everything", (7, 5), (3, 4), border="truncated", rpb=True, dilation=2, varied=True),
        case("truncated, stride", (11, 6), (5, 3), border="truncated", stride=(3, 2), dilation=(1, 2)),
        case("many tiles", (37, 3), (3, 3), heads=1, rpb=True),
        case("one cell", (1,), 1),
        case("wide value", (5, 5), 3, value_width=11, width=5),
        case("no scale", (5, 5), 3, scale=0.0),
        case("strided", (6, 5), 3, strided=True, rpb=True),
        case("one image", (7, 7), 7, batch=1, heads=3, width=20, value_width=20),
        case("no image", (4, 4), 3, batch=0, rpb=True),
    ]
