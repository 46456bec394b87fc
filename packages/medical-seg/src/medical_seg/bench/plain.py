"""The attention layers as their authors write them, with a map of all pairs of positions: the peers of ours."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from medical_seg.layers.dual_attention import ChannelAttention, PositionAttention


class PlainPositionAttention(nn.Module):
    """γ·softmax(qᵀk) v + x with its N×N map, kept for the backward pass."""

    def __init__(self, ours: PositionAttention) -> None:
        super().__init__()
        self.query_conv, self.key_conv, self.value_conv = ours.query_conv, ours.key_conv, ours.value_conv
        self.gamma = ours.gamma

    def forward(self, x: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B C *grid"]:
        """x plus γ times the attention of all places to all places; holds the (cells, cells) scores."""
        q, k, v = (conv(x).flatten(2) for conv in (self.query_conv, self.key_conv, self.value_conv))
        weights = torch.bmm(q.transpose(1, 2), k).softmax(-1)
        return self.gamma * torch.bmm(v, weights.transpose(1, 2)).view_as(x) + x


class PlainChannelAttention(nn.Module):
    """γ·softmax(rowmax − XXᵀ) X + x."""

    def __init__(self, ours: ChannelAttention) -> None:
        super().__init__()
        self.gamma = ours.gamma

    def forward(self, x: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B C *grid"]:
        """x plus γ times the attention among channels, which prefers those least alike."""
        flat = x.flatten(2)
        energy = torch.bmm(flat, flat.transpose(1, 2))
        weights = (energy.amax(-1, keepdim=True) - energy).softmax(-1)
        return self.gamma * torch.bmm(weights, flat).view_as(x) + x


def with_plain_attention(network: nn.Module) -> nn.Module:
    """A copy of a network whose attention layers are plain."""
    other = copy.deepcopy(network)
    for module in list(other.modules()):
        for name, child in list(module.named_children()):
            plain: Any = None
            if isinstance(child, PositionAttention):
                plain = PlainPositionAttention(child)
            elif isinstance(child, ChannelAttention) and child.rule == "danet":
                plain = PlainChannelAttention(child)
            if plain is not None:
                setattr(module, name, plain)
    return other
