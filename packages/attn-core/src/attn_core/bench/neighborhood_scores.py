"""Benchmark of :func:`attn_core.neighborhood_scores`: NAT's stages, and the local correlation of two feature maps."""

import math
from typing import Any

import torch
from torch import Tensor

from attn_core import neighborhood_scores
from attn_core.dispatch import Backend
from attn_core.ops.neighborhood_scores.slots import Windows, all_slots

from .case import BenchCase, Call, Inputs, Provider, backends


def cases(device: str, quick: bool) -> list[BenchCase]:  # noqa: ARG001  one size for every device
    """NAT's and DiNAT's first stage, a local correlation, and a sweep over the length."""
    if quick:
        sweep = [_case(f"length {n}, window 9", 2, (n,), (9,), 8, sweep=True) for n in (32, 64)]
        return [_case("8×8, window 3", 2, (8, 8), (3, 3), 8), *sweep]
    return [
        _case("NAT stage 1, 56×56, window 7", 2, (56, 56), (7, 7), 32),
        _case("DiNAT stage 1, dilation 8", 2, (56, 56), (7, 7), 32, dilation=8),
        _case("correlation 15×15 of 30×54, 64 channels", 1, (30, 54), (15, 15), 64, border="zero"),
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
    border: Any = "shifted",
    sweep: bool = False,
) -> BenchCase:
    def inputs() -> Inputs:
        return {x: torch.randn(1, heads, *grid, width, dtype=torch.float64) for x in "qk"}

    def ours(x: Inputs, backend: Backend) -> Tensor:
        return neighborhood_scores(x["q"], x["k"], kernel, dilation=dilation, border=border, backend=backend)

    def gathered(x: Inputs) -> Call:
        axes = len(grid)
        key, held, _ = all_slots(Windows(grid, kernel, (dilation,) * axes, (False,) * axes, border))
        key, held = key.to(x["q"].device), held.to(x["q"].device)

        def run() -> Tensor:
            q, k = x["q"].flatten(2, -2), x["k"].flatten(2, -2)
            scores = (q.unsqueeze(3) * k[:, :, key]).sum(-1)
            return scores.masked_fill(~held, 0.0 if border == "zero" else -math.inf).unflatten(2, grid)

        return run

    providers = {**backends(ours, "q"), "gathered windows": Provider(gathered)}
    cells = math.prod(grid)
    flops = 2 * heads * cells * math.prod(kernel) * width
    return BenchCase(name, inputs, providers, flops, backward_factor=3, length=cells if sweep else None)
