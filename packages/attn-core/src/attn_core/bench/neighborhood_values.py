"""Benchmark of :func:`attn_core.neighborhood_values`: NAT's stages, and a sequence."""

import math

import torch
from torch import Tensor

from attn_core import neighborhood_values
from attn_core.dispatch import Backend
from attn_core.ops.neighborhood_scores.slots import Windows, all_slots

from .case import BenchCase, Call, Inputs, Provider, backends


def cases(device: str, quick: bool) -> list[BenchCase]:  # noqa: ARG001  one size for every device
    """NAT's and DiNAT's first stage, and a sweep over the length."""
    if quick:
        sweep = [_case(f"length {n}, window 9", 2, (n,), (9,), 8, sweep=True) for n in (32, 64)]
        return [_case("8×8, window 3", 2, (8, 8), (3, 3), 8), *sweep]
    return [
        _case("NAT stage 1, 56×56, window 7", 2, (56, 56), (7, 7), 32),
        _case("DiNAT stage 1, dilation 8", 2, (56, 56), (7, 7), 32, dilation=8),
        *(_case(f"length {n}, window 33", 2, (n,), (33,), 32, sweep=True) for n in (512, 1024, 2048)),
    ]


def _case(
    name: str,
    heads: int,
    grid: tuple[int, ...],
    kernel: tuple[int, ...],
    width: int,
    *,
    dilation: int = 1,
    sweep: bool = False,
) -> BenchCase:
    def inputs() -> Inputs:
        weights = torch.rand(1, heads, *grid, math.prod(kernel), dtype=torch.float64)
        return {"p": weights / math.prod(kernel), "v": torch.randn(1, heads, *grid, width, dtype=torch.float64)}

    def ours(x: Inputs, backend: Backend) -> Tensor:
        return neighborhood_values(x["p"], x["v"], kernel, dilation=dilation, backend=backend)

    def gathered(x: Inputs) -> Call:
        axes = len(grid)
        key, _, _ = all_slots(Windows(grid, kernel, (dilation,) * axes, (False,) * axes, "shifted"))
        key = key.to(x["v"].device)

        def run() -> Tensor:
            p, v = x["p"].flatten(2, -2), x["v"].flatten(2, -2)
            return (p.unsqueeze(-1) * v[:, :, key]).sum(3).unflatten(2, grid)

        return run

    providers = {**backends(ours, "p"), "gathered windows": Provider(gathered)}
    cells = math.prod(grid)
    flops = 2 * heads * cells * math.prod(kernel) * width
    return BenchCase(name, inputs, providers, flops, backward_factor=3, length=cells if sweep else None)
