"""Seeded cases of ``focal_modulation``."""

from typing import Any

import torch
from torch import Tensor

from attn_core import focal_modulation
from attn_core.testing.harness import Case, tensor


def _case(
    name: str,
    *,
    batch: int = 2,
    channels: int = 5,
    grid: tuple[int, int] = (6, 7),
    kernels: tuple[int, ...] = (3, 5),
    layout: str = "plain",
    varied: bool = False,
    **options: Any,
) -> Case:
    def build(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
        def data(channels: int) -> Tensor:
            if layout == "projection":  # a slice of a channels-last projection
                wide = tensor(dtype, device, batch, *grid, channels + 4, gradient=False)
                return wide[..., 2:-2].permute(0, 3, 1, 2).requires_grad_()
            if layout == "every second":
                wide = tensor(dtype, device, batch, channels, grid[0], 2 * grid[1], gradient=False)
                return wide[..., ::2].requires_grad_()
            return tensor(dtype, device, batch, channels, *grid)

        # Weights of a size that keeps the maps near 1 from level to level.
        weights = [(tensor(dtype, device, channels, 1, k, k, gradient=False) / k).requires_grad_() for k in kernels]
        return [data(channels), data(len(kernels) + 1), weights], dict(options)

    return Case(focal_modulation, name, build, varied)


def cases() -> list[Case]:
    """None to three levels, kernels larger than the map, layouts; and nothing at all."""
    case = _case
    return [
        case("plain", varied=True),
        case("projection", layout="projection", varied=True),
        case("every second column", layout="every second"),
        case("normalized", normalize=True, kernels=(3, 5, 7), varied=True),
        case("one level", kernels=(7,)),
        case("the mean alone", kernels=()),
        case("kernel of one pixel", kernels=(1, 3)),
        case("kernels larger than the map", grid=(3, 2), kernels=(5, 9)),
        case("one pixel", grid=(1, 1)),
        case("one channel", channels=1),
        case("one image", batch=1, channels=16, grid=(8, 8)),
        case("prime sizes", batch=3, channels=19, grid=(13, 11)),
        case("no image", batch=0),
        case("no pixel", grid=(0, 4)),
    ]
