"""What token pooling and the attention behind it show in RVT and FAN: how far tokens reach, whom a token attends to."""

from typing import Any

import torch
from torch import Tensor

from vision_models.layers.token_pooling import Attended, ObservedAttention, TokenPooling, attention_of
from vision_models.pictures.explain.panel import Panel, brightness, inputs_of, token_at


def columns(
    net: Any, chosen: dict[Any, str], image: Tensor, point: tuple[float, float], maps: list[tuple[int, int]]
) -> list[list[Panel]]:
    """For each chosen block the mean dilation that its tokens are pooled with, and attention of the token at the point.

    Args:
        net: the network. chosen: block → its name, in the order of the network.
        maps: rows and columns of each chosen block's tokens.
    """
    blocks = [block for block in net.modules() if isinstance(getattr(block, "attn", None), ObservedAttention)]
    pools = [block.pooling for block in chosen if isinstance(block.pooling, TokenPooling)]
    with attention_of(net) as seen:
        inputs = inputs_of(net, pools, image)
    found = []
    for (block, name), grid in zip(chosen.items(), maps, strict=True):
        place = token_at(point, grid)
        column = [_attention(seen[blocks.index(block)], grid, place, name)]
        if block.pooling in inputs:
            column = [*_pooling(block.pooling, inputs[block.pooling], place, name), *column]
        found.append(column)
    return found


def attention_rows(layer: Attended) -> Tensor:
    """(N, N): attention of the first image, mean over heads."""
    scores = layer.q[0] @ layer.k[0].mT * layer.q.shape[3] ** -0.5
    return (scores if layer.gate is None else scores * layer.gate).softmax(2).mean(0)


def _pooling(pooling: Any, x: Tensor, place: tuple[int, int], name: str) -> list[Panel]:
    weights = pooling.weights(x)[0]
    reach = weights @ torch.arange(weights.shape[2], dtype=weights.dtype, device=weights.device)
    title = f"{name}: mean dilation {float(reach.min()):.1f} to {float(reach.max()):.1f}"
    light = 0.15 + 0.85 * reach.float().cpu() / max(1, weights.shape[2] - 1)
    return [Panel(title, light, (1, 1), [(*place, 1, 1)])]


def _attention(layer: Attended, grid: tuple[int, int], place: tuple[int, int], name: str) -> Panel:
    row = attention_rows(layer)[place[0] * grid[1] + place[1]]
    frames = [(*place, 1, 1)]
    return Panel(f"{name}: attention", brightness(row.view(grid)), (1, 1), frames)
