"""What the last block of each FocalNet stage gathers: the gate of each focal level, and the modulator."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vision_models.models.focalnet import FocalModulation, FocalNet, modulator
from vision_models.pictures.explain.panel import Panel, brightness, inputs_of, spread, token_at


def panels(net: FocalNet, image: Tensor, point: tuple[float, float]) -> list[list[Panel]]:
    """Per stage: |gate| of every level, on one scale, and the length of the modulator at every token.

    An isotropic network shows four of its blocks.
    """
    stages: list[Any] = list(net.stages)
    chosen = {stages[i].blocks[-1].modulation: i + 1 for i in spread(len(stages), 4)}
    return [_column(m, x, point, chosen[m]) for m, x in inputs_of(net, list(chosen), image).items()]  # pyright: ignore[reportArgumentType]


def gates_and_modulator(modulation: FocalModulation, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gates (L + 1, Y, X) and the length of the modulator (Y, X) for x (1, Y, X, C)."""
    dim = modulation.dim
    projected = modulation.f(x)
    gates = projected[..., 2 * dim :]
    weights: list[Any] = [layer[0].weight for layer in modulation.focal_layers]  # pyright: ignore[reportIndexIssue]
    context = modulator(projected[..., dim : 2 * dim], gates, weights, modulation.normalize_modulator)
    length = F.linear(context, modulation.h.weight, modulation.h.bias).norm(dim=-1)  # pyright: ignore[reportArgumentType]
    return gates[0].permute(2, 0, 1), length[0]


def _column(modulation: FocalModulation, x: Tensor, point: tuple[float, float], number: int) -> list[Panel]:
    gates, length = gates_and_modulator(modulation, x)
    strength = gates.abs() / gates.abs().max().clamp(min=1e-12)
    row, column = token_at(point, (x.shape[1], x.shape[2]))
    shares = strength[:, row, column] / strength[:, row, column].sum().clamp(min=1e-12)
    token = [(row, column, 1, 1)]
    kernels = [layer[0].weight.shape[2] for layer in modulation.focal_layers]  # pyright: ignore[reportIndexIssue]
    fields = [1 + sum(kernel - 1 for kernel in kernels[: level + 1]) for level in range(len(kernels))]
    names = [f"gate {field}×{field}" for field in fields] + ["gate, whole map"]
    column_panels = [
        Panel(f"stage {number}: {name}, {100 * float(share):.0f} % here", 0.15 + 0.85 * level.cpu(), None, token)
        for name, level, share in zip(names, strength.float(), shares, strict=True)
    ]
    return [*column_panels, Panel(f"stage {number}: length of the modulator", brightness(length), None, token)]
