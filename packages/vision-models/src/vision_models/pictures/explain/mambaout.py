"""What the last block of each MambaOut stage lets through: where its gates open, and what a token takes in there."""

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from vision_models.models.mambaout import MambaOut
from vision_models.pictures.explain.panel import Panel, brightness, inputs_of, token_at


def panels(net: MambaOut, image: Tensor, point: tuple[float, float]) -> list[list[Panel]]:
    """Per stage: how wide the gates of each token stand open, and what its neighbors add to the token at the point."""
    stages: list[Any] = list(net.stages)
    chosen = {stage.blocks[-1]: number for number, stage in enumerate(stages, start=1)}
    return [_column(block, x, point, chosen[block]) for block, x in inputs_of(net, list(chosen), image).items()]


def gates_and_neighbors(block: Any, x: Tensor, row: int, column: int) -> tuple[Tensor, Tensor]:
    """Gates (Y, X, hidden), and what each neighbor adds to the gated convolution of one token (k, k, convolved).

    The neighbors' parts and the gated bias sum up to what the gate lets through; x (1, Y, X, C).
    """
    gate, _, value = block.projected(block.norm(x))
    reach = block.conv.kernel_size[0]
    around = F.pad(value[0], (0, 0, *(reach // 2,) * 4))[row : row + reach, column : column + reach]
    read = around * block.conv.weight[:, 0].permute(1, 2, 0)
    return gate[0], read * gate[0, row, column, -read.shape[2] :]


def _column(block: Any, x: Tensor, point: tuple[float, float], number: int) -> list[Panel]:
    row, column = token_at(point, (x.shape[1], x.shape[2]))
    gates, parts = gates_and_neighbors(block, x, row, column)
    reach = parts.shape[0]
    top, left = row - reach // 2, column - reach // 2
    lengths = F.pad(parts.norm(dim=2), (left, x.shape[2] - left - reach, top, x.shape[1] - top - reach))
    frames = [(row, column, 1, 1), (top, left, reach, reach)]
    return [
        Panel(f"stage {number}: mean |gate| of a token", brightness(gates.abs().mean(2)), None, frames[:1]),
        Panel(f"stage {number}: added to the token, {reach}×{reach}", brightness(lengths), None, frames),
    ]
