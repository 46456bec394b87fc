"""DAUNet: a U-Net with position and channel attention at its bottom, whose result can guide every decoder stage.

Paper: Bouget et al., Meningioma segmentation in T1-weighted MRI leveraging global context and attention mechanisms,
Frontiers in Radiology 2021 (arXiv 2101.07715); there with input pyramid, deep supervision and guiding.
Official code: https://github.com/dbouget/mri_brain_tumor_segmentation (BSD-2), src/Models/UNet/DualAttentionUNet.py
(Keras).

Same: every layer and its order; channel attention mixes with the columns of its softmax, where DANet takes rows.
Differs: positions attend in tiles, so the bottom may have tens of thousands of voxels (officially an N×N map per
sample). The three projections of position attention are parameters: officially they are created inside a layer's call
and are therefore neither trained nor saved, each reload draws new ones. Guiding resizes linearly and projects: the
official transposed convolution with three taps and stride 4, 8, 16 reaches (3/stride)³ of the voxels only;
``guide="holes"`` builds it, for checkpoints. Logits instead of probabilities.
Checked: tests/models/test_agunet.py, against an independent transcription of the Keras layers in float64.

Shapes: as `AGUNet`.
"""

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core.catalog import Card, Entry
from medical_seg.layers.dual_attention import CONVOLUTIONS, ChannelAttention, PositionAttention
from medical_seg.models.agunet import FILTERS, AttentionUNet, ConvBlock, TransposedConv, batch_norm, spatial_dropout

_LINEAR = {2: "bilinear", 3: "trilinear"}


class DualAttention(nn.Module):
    """Sum of a position and a channel branch, each attention → convolution → normalization → ReLU → convolution."""

    def __init__(self, spatial_dims: int, channels: int) -> None:
        super().__init__()
        self.position = self._branch(spatial_dims, channels, PositionAttention(channels, spatial_dims, bias=False))
        self.channel = self._branch(spatial_dims, channels, ChannelAttention("daunet"))
        self.dropout = spatial_dropout(spatial_dims, 0.5)
        self.project = CONVOLUTIONS[spatial_dims](channels, channels, 1)
        self.norm = batch_norm(spatial_dims, channels)

    @staticmethod
    def _branch(spatial_dims: int, channels: int, attend: nn.Module) -> nn.Sequential:
        convolution = CONVOLUTIONS[spatial_dims]
        return nn.Sequential(
            attend,
            convolution(channels, channels, 3, padding=1),
            batch_norm(spatial_dims, channels),
            nn.ReLU(inplace=True),
            spatial_dropout(spatial_dims, 0.5),
            convolution(channels, channels, 3, padding=1),
        )

    def forward(self, x: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B C *grid"]:
        """Position and channel attention, summed, projected and normed."""
        return self.norm(self.project(self.dropout(self.position(x) + self.channel(x))))


class InterpolatedGuide(nn.Module):
    """Bottom features on a finer grid: projected first, because both steps are linear and the grid grows."""

    def __init__(self, spatial_dims: int, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv = CONVOLUTIONS[spatial_dims](channels, width, 1)
        self.stride = stride
        self.mode = _LINEAR[spatial_dims]

    def forward(self, x: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B W *finer"]:
        """A 1×1 convolution of the deepest features, interpolated to this stage's grid."""
        return F.interpolate(self.conv(x), scale_factor=float(self.stride), mode=self.mode)


class JoinedStage(nn.Module):
    """Decoder stage: upsample, join with the skip connection (and the guide), normalize the whole, convolve."""

    def __init__(
        self, spatial_dims: int, channels: int, width: int, dropout: float, bottom: int, stride: int, guide: str | None
    ) -> None:
        super().__init__()
        self.up = TransposedConv(spatial_dims, channels, width)
        kinds = {"linear": InterpolatedGuide, "holes": TransposedConv}
        self.guide = kinds[guide](spatial_dims, bottom, width, stride) if guide else None
        self.norm = batch_norm(spatial_dims, (3 if guide else 2) * width)
        self.block = ConvBlock(spatial_dims, (3 if guide else 2) * width, width, dropout)

    def forward(
        self, x: Float[Tensor, "B C *coarse"], skip: Float[Tensor, "B W *grid"], bottom: Float[Tensor, "B F *coarsest"]
    ) -> Float[Tensor, "B W *grid"]:
        """x brought up to the skip connection's grid, joined with it and with the guide from the deepest features."""
        guide = [] if self.guide is None else [self.guide(bottom)]
        return self.block(F.relu(self.norm(torch.cat([*guide, skip, self.up(x)], 1))))


class DAUNet(AttentionUNet):
    """U-Net with dual attention at the bottom; every option can be switched by itself.

    Args:
        spatial_dims: 2 or 3.
        in_channels: C.
        out_channels: K, the number of classes with the background.
        filters: channels of the levels, the bottom last.
        deep_supervision: one head per decoder stage; in training all of them answer.
        input_pyramid: each level also sees the input, averaged to its size.
        attention_guiding: every decoder stage also sees the attended bottom.
        dual_attention: False leaves the bottom as it is.
        guide: how the bottom reaches a stage's grid: ``"linear"``, or ``"holes"`` as in official checkpoints.
        dropout: share of the channels dropped behind each ReLU of the convolution blocks.
        stem: as in `AGUNet`.

    Raises: ValueError for sizes that make no network or an unknown guide.
    """

    def __init__(
        self,
        spatial_dims: int = 3,
        in_channels: int = 1,
        out_channels: int = 2,
        filters: Sequence[int] = FILTERS,
        *,
        deep_supervision: bool = False,
        input_pyramid: bool = False,
        attention_guiding: bool = False,
        dual_attention: bool = True,
        guide: Literal["linear", "holes"] = "linear",
        dropout: float = 0.0,
        stem: int = 1,
    ) -> None:
        if guide not in ("linear", "holes"):
            raise ValueError(f"DAUNet: guide must be 'linear' or 'holes', got guide={guide!r}")
        super().__init__(
            spatial_dims,
            in_channels,
            out_channels,
            filters,
            deep_supervision=deep_supervision,
            input_pyramid=input_pyramid,
            dropout=dropout,
            stem=stem,
        )
        self.attention_guiding = attention_guiding
        self.attend = DualAttention(spatial_dims, self.filters[-1]) if dual_attention else nn.Identity()
        self.decoder = nn.ModuleList(
            JoinedStage(
                spatial_dims,
                before,
                width,
                dropout,
                bottom=self.filters[-1],
                stride=2 ** (level + 1),
                guide=guide if attention_guiding else None,
            )
            for level, (before, width) in enumerate(pairwise(self.filters[::-1]))
        )
        self.finish()

    def decode(self, x: Float[Tensor, "B F *coarse"], skips: list[Tensor]) -> list[Tensor]:
        """Features of all decoder stages, coarse to fine."""
        x = bottom = self.attend(x)
        stages = []
        for stage, skip in zip(self.decoder, reversed(skips), strict=True):
            x = stage(x, skip, bottom)
            stages.append(x)
        return stages


CARD = Card(
    family="DAUNet",
    paper="2101.07715",
    code="https://github.com/dbouget/mri_brain_tumor_segmentation",
    license="BSD-2-Clause",
    test="models/test_agunet.py",
)
ENTRIES = [
    Entry("daunet", DAUNet, CARD("Position and channel attention at the bottom.")),
    Entry(
        "daunet_full",
        partial(DAUNet, input_pyramid=True, deep_supervision=True, attention_guiding=True),
        CARD("Dual attention that guides every stage, input pyramid, deep supervision."),
    ),
    Entry(
        "daunet_small",
        partial(DAUNet, filters=(16, 32, 64), attention_guiding=True, stem=2),
        CARD("Three guided levels on half the grid, for small machines."),
    ),
    Entry("test_daunet", partial(DAUNet, filters=(4, 8, 16), attention_guiding=True), CARD("For tests.")),
]
