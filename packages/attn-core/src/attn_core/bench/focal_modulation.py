"""Benchmark of :func:`attn_core.focal_modulation`: the four stages of FocalNet-T with small and large windows."""

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core import focal_modulation
from attn_core.dispatch import Backend

from .case import BenchCase, Inputs, Provider, backends

# side of the map: channels
STAGES = {56: 96, 28: 192, 14: 384, 7: 768}
SIDES = (14, 28, 56, 112)


def cases(device: str, quick: bool) -> list[BenchCase]:
    """The stages of FocalNet-T with both receptive fields, and a sweep over the side of the map."""
    if quick:
        sweep = [_case(f"side {n}", 2, n, 8, (3, 5), sweep=True) for n in (6, 12)]
        return [*sweep, _case("8×8, three levels", 1, 8, 16, (3, 5, 7))]
    batch = 128 if device.startswith("cuda") else 8
    stages = [
        _case(f"FocalNet-T ({field}) stage {stage}, {side}²", batch, side, width, kernels)
        for field, kernels in (("SRF", (3, 5)), ("LRF", (3, 5, 7)))
        for stage, (side, width) in enumerate(STAGES.items(), 1)
    ]
    return [*stages, *(_case(f"side {n}, 96 channels", batch // 4, n, 96, (3, 5), sweep=True) for n in SIDES)]


def _case(
    name: str, batch: int, side: int, channels: int, kernels: tuple[int, ...], *, sweep: bool = False
) -> BenchCase:
    levels = len(kernels)

    def inputs() -> Inputs:
        def data(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64)

        # What FocalNet's projection leaves, without the query: (B, Y, X, C + L + 1).
        projection = data(batch, side, side, channels + levels + 1)
        return {"projection": projection, "weights": tuple(data(channels, 1, k, k) / k for k in kernels)}

    def split(x: Inputs) -> tuple[Tensor, Tensor]:
        ctx, gates = x["projection"].permute(0, 3, 1, 2).split((channels, levels + 1), 1)
        return ctx, gates

    def ours(x: Inputs, backend: Backend) -> Tensor:
        return focal_modulation(*split(x), x["weights"], backend=backend).permute(0, 2, 3, 1)

    def layers(z: Tensor, gates: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
        total = torch.zeros(())
        for level, weight in enumerate(weights):
            z = F.gelu(F.conv2d(z, weight, padding=weight.shape[-1] // 2, groups=channels))
            total = total + z * gates[:, level : level + 1]
        return total + F.gelu(z.mean((2, 3), keepdim=True)) * gates[:, levels:]

    def channels_first(x: Inputs) -> Tensor:
        ctx, gates = x["projection"].permute(0, 3, 1, 2).contiguous().split((channels, levels + 1), 1)
        return layers(ctx, gates, x["weights"]).permute(0, 2, 3, 1).contiguous()

    def channels_last(x: Inputs) -> Tensor:
        return layers(*split(x), x["weights"]).permute(0, 2, 3, 1)

    providers = {
        **backends(ours, "projection"),
        "convolutions, permuted": Provider(lambda x: lambda: channels_first(x), remark="as the official code does"),
        "convolutions, channels-last": Provider(lambda x: lambda: channels_last(x)),
    }
    flops = batch * side**2 * channels * sum(2 * k * k + 2 for k in kernels)
    return BenchCase(name, inputs, providers, flops, backward_factor=3, length=side**2 if sweep else None)
