"""What the last layer of each DaViT stage reads: the window of a token, and the channels of its strongest group."""

from typing import Any

import torch
from torch import Tensor

from vision_models.layers.token_maps import to_windows
from vision_models.models.davit import ChannelAttention, DaViT, WindowAttention, grouped_channel_attention
from vision_models.pictures.explain.panel import Panel, brightness, inputs_of, token_at


def panels(net: DaViT, image: Tensor, point: tuple[float, float]) -> list[list[Panel]]:
    """Per stage: the token's attention in its window; the matrix of its strongest group; that group's top channel."""
    columns = []
    for number, stage in enumerate(net.stages, start=1):
        last: Any = {type(m): m for m in stage.modules() if isinstance(m, (WindowAttention, ChannelAttention))}
        column = []
        for module, x in inputs_of(net, list(last.values()), image).items():
            shown = _window if isinstance(module, WindowAttention) else _channels
            column += shown(module, x, point, number)  # pyright: ignore[reportArgumentType]
        columns.append(column)
    return columns


def window_attention(attn: WindowAttention, x: Tensor, point: tuple[float, float]) -> tuple[Tensor, tuple[int, int]]:
    """Attention of the token at a point, mean over heads, as (window, window), and the window's first token."""
    side = attn.window_size
    row, column = token_at(point, (x.shape[1], x.shape[2]))
    corner = (row // side * side, column // side * side)
    number = corner[0] // side * -(-x.shape[2] // side) + corner[1] // side
    tokens = to_windows(x, side, side)[number]
    q, k, _ = attn.qkv(tokens).view(side * side, 3, attn.num_heads, -1).unbind(1)
    query = q[(row - corner[0]) * side + column - corner[1]]
    logits = torch.einsum("hd,nhd->hn", query, k) * q.shape[2] ** -0.5
    return logits.softmax(-1).mean(0).view(side, side), corner


def channel_matrix(attn: ChannelAttention, x: Tensor) -> Tensor:
    """Attention among the channels of each group (groups, d, d), rows attend; x (1, Y, X, C)."""
    tokens = x.shape[1] * x.shape[2]
    q, k, v = attn.qkv(x).view(tokens, 3, attn.num_heads, -1).unbind(1)
    scale = q.shape[2] ** -0.5
    if attn.version == 2:
        k, v, scale = q, k, tokens**-0.5
    return (scale * torch.einsum("nhd,nhe->hde", k, v)).softmax(-1)


def _window(attn: WindowAttention, x: Tensor, point: tuple[float, float], number: int) -> list[Panel]:
    attention, (top, left) = window_attention(attn, x, point)
    side = attn.window_size
    light = torch.zeros(x.shape[1], x.shape[2])
    part = attention[: x.shape[1] - top, : x.shape[2] - left]
    light[top : top + side, left : left + side] = part.cpu().float()
    title = f"stage {number}: window of {side}×{side} tokens"
    return [Panel(title, brightness(light), (side, side), [(top, left, side, side)])]


def _channels(attn: ChannelAttention, x: Tensor, point: tuple[float, float], number: int) -> list[Panel]:
    out = grouped_channel_attention(attn.qkv(x), attn.num_heads, attn.version)[0].unflatten(-1, (attn.num_heads, -1))
    row, column = token_at(point, (x.shape[1], x.shape[2]))
    group = int(out[row, column].norm(dim=-1).argmax())
    channel = int(out[row, column, group].abs().argmax())
    matrix = channel_matrix(attn, x)[group]
    width = matrix.shape[0]
    return [
        Panel(
            f"stage {number}: group {group + 1} of {attn.num_heads}, {width}×{width} channels",
            brightness(matrix, dark=0),
            over="nothing",
        ),
        Panel(
            f"stage {number}: channel {channel + 1} of that group",
            brightness(out[..., group, channel].abs()),
            frames=[(row, column, 1, 1)],
        ),
    ]
