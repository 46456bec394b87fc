"""Attention between all positions and between all channels of a feature map, as in DANet and its medical descendants.

Three published conventions differ in biases, in the sign of the channel logits and in which side of the channel
softmax sums to one; each is a flag here. Sources: Fu et al., Dual attention network for scene segmentation, CVPR 2019
(arXiv 1809.02983); dbouget/mri_brain_tumor_segmentation, src/Models/UNet/DualAttentionUNet.py;
sinAshish/Multi-Scale-Attention, src/models/attention.py.

No N×N map of positions is ever held: `attn_core.attention` goes over the keys in tiles.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attn_core import attention, channel_attention

CONVOLUTIONS: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}


class PositionAttention(nn.Module):
    """Every voxel reads all others: γ·softmax(q kᵀ) v + x, unscaled, with q and k of C/reduction channels.

    Args:
        channels: C.
        spatial_dims: 2 or 3.
        bias: of the three projections; the medical 2-D network has it, DAUNet has not.
        reduction: C divided by the width of queries and keys.

    Shapes: (B, C, *grid) → (B, C, *grid). γ starts at 0: a new module is the identity.
    Raises: ValueError if nothing of C is left after the reduction.
    """

    def __init__(self, channels: int, spatial_dims: int, *, bias: bool = True, reduction: int = 8) -> None:
        super().__init__()
        if channels < reduction:
            raise ValueError(
                f"PositionAttention: queries of channels/reduction={channels}/{reduction} channels are empty; "
                f"use at least {reduction} channels"
            )
        convolution = CONVOLUTIONS[spatial_dims]
        self.query_conv = convolution(channels, channels // reduction, 1, bias=bias)
        self.key_conv = convolution(channels, channels // reduction, 1, bias=bias)
        self.value_conv = convolution(channels, channels, 1, bias=bias)
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B C *grid"]:
        """x plus γ times the attention of all places to all places."""
        q, k, v = (_tokens(projection(x)) for projection in (self.query_conv, self.key_conv, self.value_conv))
        out, _ = attention(q, k, v, scale=1.0)
        return torch.addcmul(x, self.gamma.to(x.dtype), _as_map(out, x))


class ChannelAttention(nn.Module):
    """Every channel reads all others, weighted by a softmax over the C×C products of the map with itself.

    Args:
        rule: ``"danet"`` takes softmax(row maximum − E) and mixes with its rows (DANet, multi-scale guided attention);
            ``"daunet"`` takes softmax(E) and mixes with its columns.

    Shapes: (B, C, *grid) → (B, C, *grid). The products are summed in float32: in float16 they would overflow.
    """

    def __init__(self, rule: Literal["danet", "daunet"]) -> None:
        super().__init__()
        if rule not in ("danet", "daunet"):
            raise ValueError(f"ChannelAttention: rule must be 'danet' or 'daunet', got rule={rule!r}")
        self.rule = rule
        self.gamma = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B C *grid"]:
        """x plus γ times the attention among channels."""
        tokens = _tokens(x)
        danet = self.rule == "danet"
        out = channel_attention(tokens, tokens, tokens, negate_max=danet, transpose=not danet)
        return torch.addcmul(x, self.gamma.to(x.dtype), _as_map(out, x))


def _tokens(x: Tensor) -> Tensor:
    """(B, C, *grid) → (B, 1, N, C), a view."""
    return x.flatten(2).mT[:, None]


def _as_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, 1, N, C) → the shape of ``like``."""
    return tokens[:, 0].mT.reshape(like.shape).to(like.dtype)
