"""Benchmark of :func:`attn_core.deformable_attention`: encoder and decoder of Deformable-DETR, lifting of DFA3D."""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core import deformable_attention
from attn_core.dispatch import Backend

from .case import BenchCase, Call, Inputs, Provider, backends

Maps = tuple[tuple[int, int], ...]
# An image of 800 × 1333 at strides 8 to 64.
LARGE: Maps = ((100, 167), (50, 84), (25, 42), (13, 21))
SMALL: Maps = ((50, 84), (25, 42), (13, 21), (7, 11))
LENGTHS = (512, 1024, 2048, 4096)


def cases(device: str, quick: bool) -> list[BenchCase]:
    """Encoder, decoder and lifting at published sizes, and a sweep over the number of queries."""
    if quick:
        tiny: Maps = ((6, 8), (3, 4))
        sweep = [_case(f"{n} queries", 1, tiny, n, heads=2, width=8, sweep=True) for n in (32, 64)]
        return [_case("lifting, tiny", 1, tiny, 20, heads=2, width=8, bins=6), *sweep]
    batch = 4 if device.startswith("cuda") else 1
    return [
        _case("encoder, 5576 cells of 4 maps", batch, SMALL, _cells(SMALL)),
        _case("decoder, 900 queries on 22223 cells", batch, LARGE, 900),
        _case("lifting, 1500 queries, 56 bins", batch, SMALL[:2], 1500, bins=56),
        *(_case(f"{n} queries", batch, SMALL, n, sweep=True) for n in LENGTHS),
    ]


def _cells(maps: Maps) -> int:
    return sum(h * w for h, w in maps)


def _places(sizes: tuple[int, ...], *shape: int) -> Tensor:
    """Locations between cells, never so close to a cell's center that float32 and float64 sort them differently."""
    size = torch.tensor(sizes, dtype=torch.float64)
    between = (torch.rand(*shape, len(sizes), dtype=torch.float64) * (size + 1)).floor() - 0.5
    return (between + 0.05 + 0.9 * torch.rand(*shape, len(sizes), dtype=torch.float64)) / size


# Whole: inputs, the operator and its four peers over one set of sizes.
def _case(
    name: str,
    batch: int,
    maps: Maps,
    queries: int,
    *,
    heads: int = 8,
    width: int = 32,
    points: int = 4,
    bins: int = 0,
    sweep: bool = False,
) -> BenchCase:
    levels, cells = len(maps), _cells(maps)

    def inputs() -> Inputs:
        sizes = [(w, h, bins) if bins else (w, h) for h, w in maps]
        places = torch.stack([_places(size, batch, queries, heads, points) for size in sizes], 3)
        weights = torch.rand(batch, queries, heads, levels * points, dtype=torch.float64).softmax(-1)
        data = {
            "value": torch.randn(batch, cells, heads, width, dtype=torch.float64),
            "locations": places,
            "weights": weights.unflatten(-1, (levels, points)),
        }
        if bins:
            data["depth"] = torch.randn(batch, cells, heads, bins, dtype=torch.float64).softmax(-1)
        return data

    def exact(x: Inputs) -> Tensor:
        """Locations in the one dtype that they may have."""
        return x["locations"] if x["value"].dtype == torch.float64 else x["locations"].float()

    def ours(x: Inputs, backend: Backend) -> Tensor:
        return deformable_attention(x["value"], maps, exact(x), x["weights"], x.get("depth"), backend=backend)

    def sampled(x: Inputs) -> Tensor:
        """The formulation of Deformable-DETR's and mmcv's fallback: all samples side by side; lifted maps in full."""
        value, locations, weights = x["value"], 2 * x["locations"] - 1, x["weights"]
        samples, start = [], 0
        for level, (h, w) in enumerate(maps):
            each = value[:, start : start + h * w]
            features = each.permute(0, 2, 3, 1).reshape(batch * heads, width, h, w)
            grid = locations[:, :, :, level].transpose(1, 2).flatten(0, 1)
            if bins:
                chances = x["depth"][:, start : start + h * w].permute(0, 2, 3, 1).reshape(batch * heads, 1, bins, h, w)
                lifted = F.grid_sample(features.unsqueeze(2) * chances, grid.unsqueeze(1), align_corners=False)
                samples.append(lifted.squeeze(2))
            else:
                samples.append(F.grid_sample(features, grid, align_corners=False))
            start += h * w
        by_head = weights.transpose(1, 2).reshape(batch * heads, 1, queries, levels * points)
        out = (torch.stack(samples, -2).flatten(-2) * by_head).sum(-1)
        return out.view(batch, heads * width, queries).transpose(1, 2)

    providers = backends(ours, "value")

    def original(x: Inputs) -> Call:
        """Deformable-DETR's function over the stand-in for its extension."""
        shim = importlib.import_module("attn_core.compat.shims.msda")
        shapes = torch.tensor(maps, device=x["value"].device)
        starts = torch.cat([shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]])
        return lambda: _Original.apply(shim, x["value"], shapes, starts, exact(x), x["weights"])

    providers["grid_sample"] = Provider(lambda x: lambda: sampled(x))
    if not bins:
        providers["the original's function"] = Provider(original, remark="over MultiScaleDeformableAttention's shim")
    corners = batch * queries * heads * levels * points * (8 if bins else 4)
    return BenchCase(
        name,
        inputs,
        providers,
        flops=2 * corners * width,
        backward_factor=3,
        length=queries if sweep else None,
    )


class _Original(torch.autograd.Function):
    """What the repositories put around their extension."""

    @staticmethod
    def forward(ctx: Any, shim: Any, *tensors: Tensor) -> Tensor:
        """Of value, shapes, starts, locations and weights."""
        ctx.shim = shim
        ctx.save_for_backward(*tensors)
        return shim.ms_deform_attn_forward(*tensors, 64)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Of value, locations and weights."""
        value, locations, weights = ctx.shim.ms_deform_attn_backward(*ctx.saved_tensors, *grads, 64)
        return None, value, None, None, locations, weights
