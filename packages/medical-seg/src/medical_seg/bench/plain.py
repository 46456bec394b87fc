"""The layers as their authors write them, the peers of ours: attention with a map of all pairs of positions, scans by a
loop over tokens that holds gates and terms of all of them."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from medical_seg.layers.dual_attention import ChannelAttention, PositionAttention
from medical_seg.layers.state_space.ss2d import SS2D


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


class PlainSS2D(nn.Module):
    """SS2D with the parameters of ours, its four walks by the loop of Mamba's reference."""

    def __init__(self, ours: SS2D) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Float[Tensor, "B Y X C"]) -> Float[Tensor, "B Y X C"]:
        """What ours computes."""
        ours = self.ours
        x, gate = ours.in_proj(x).chunk(2, -1)
        maps = F.silu(ours.conv2d(x.permute(0, 3, 1, 2)))
        rows, columns = maps.flatten(2), maps.transpose(2, 3).flatten(2)
        u = torch.stack([rows, columns, rows.flip(-1), columns.flip(-1)], 1)
        y = looped(u, *ours.walks())
        straight, turned = y[:, 0] + y[:, 2].flip(-1), y[:, 1] + y[:, 3].flip(-1)
        y = straight.view(maps.shape) + turned.view(maps.transpose(2, 3).shape).transpose(2, 3)
        return ours.out_proj(ours.out_norm(y.permute(0, 2, 3, 1)) * F.silu(gate))


def looped(
    u: Float[Tensor, "B S C T"],
    maps: Float[Tensor, "S K C"],
    step: Float[Tensor, "S C r"],
    bias: Float[Tensor, "S C"],
    decay: Float[Tensor, "S C N"],
    skip: Float[Tensor, "S C"],
) -> Float[Tensor, "B S C T"]:
    """Mamba's reference: gates and terms (B, S, C, T, N) first, then one token after the other."""
    states, rank = decay.shape[-1], step.shape[-1]
    low, entry, leave = torch.einsum("bsct,skc->bskt", u, maps).split([rank, states, states], 2)
    delta = F.softplus(torch.einsum("bsrt,scr->bsct", low, step) + bias[..., None])
    gates = torch.exp(torch.einsum("bsct,scn->bsctn", delta, -decay.exp()))
    terms = torch.einsum("bsct,bsnt,bsct->bsctn", delta, entry, u)
    h, out = torch.zeros_like(gates[:, :, :, 0]), []
    for t in range(u.shape[-1]):
        h = gates[:, :, :, t] * h + terms[:, :, :, t]
        out.append(torch.einsum("bscn,bsn->bsc", h, leave[..., t]))
    return torch.stack(out, -1) + skip[..., None] * u


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
