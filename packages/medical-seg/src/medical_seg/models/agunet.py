"""AGUNet: a U-Net whose skip connections pass attention gates, for whole MRI volumes.

Paper: Bouget et al., Meningioma segmentation in T1-weighted MRI leveraging global context and attention mechanisms,
Frontiers in Radiology 2021 (arXiv 2101.07715).
Official code: https://github.com/dbouget/mri_brain_tumor_segmentation (BSD-2), src/Models/UNet/AttentionGatedUNet.py
(Keras).

Same: every layer, its order (which the Keras checkpoints are read by), batch normalization with ε 1e-3 and momentum
0.99, Glorot start, transposed convolutions cropped at the end of each axis as Keras pads.
Differs: logits instead of probabilities; any grid that is divisible by 2^poolings (the official graph needs an axis of
more than 4 before every pooling, because below that it pools with stride 1 and its decoder then does not fit); two
dimensions as well as three; ``stem`` for crops and machines that are small. The file's unused second gate is left out:
its output has another size than what it multiplies.
Checked: tests/models/test_agunet.py, against an independent transcription of the Keras layers in float64.

Shapes: (B, C, *grid) → (B, K, *grid) logits; in training with deep supervision a list, finest first, at 1, 1/2, 1/4 …
of the grid.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core.catalog import Card, Entry
from medical_seg.layers.dual_attention import CONVOLUTIONS

FILTERS = (16, 32, 128, 256, 256)
STEM_WIDTH = 8
_TRANSPOSED: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
_NORMS: dict[int, Any] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_DROPOUTS: dict[int, Any] = {2: nn.Dropout2d, 3: nn.Dropout3d}
_POOLS: dict[int, Any] = {2: F.max_pool2d, 3: F.max_pool3d}
_MEANS: dict[int, Any] = {2: F.avg_pool2d, 3: F.avg_pool3d}


def batch_norm(spatial_dims: int, channels: int) -> nn.Module:
    """Keras' batch normalization: ε 1e-3; its momentum of 0.99 is torch's 0.01."""
    return _NORMS[spatial_dims](channels, eps=1e-3, momentum=0.01)


def spatial_dropout(spatial_dims: int, share: float) -> nn.Module:
    """Dropout of whole channels."""
    return _DROPOUTS[spatial_dims](share)


class ConvBlock(nn.Sequential):
    """Twice: 3-wide convolution, batch normalization, ReLU, dropout of whole channels."""

    def __init__(self, spatial_dims: int, channels: int, width: int, dropout: float) -> None:
        layers: list[nn.Module] = []
        for before, after in pairwise((channels, width, width)):
            layers.append(CONVOLUTIONS[spatial_dims](before, after, 3, padding=1))
            layers.append(batch_norm(spatial_dims, after))
            layers.append(nn.ReLU(inplace=True))
            if dropout:
                layers.append(spatial_dropout(spatial_dims, dropout))
        super().__init__(*layers)


class TransposedConv(nn.Module):
    """Keras' ``Conv3DTranspose(width, 3, padding="same", strides=stride)``: n → n·stride voxels.

    With stride 2 the full output is 2n+1 long and Keras drops its last voxel; torch's ``padding=1, output_padding=1``
    would be shifted by one. With a larger stride there are holes: three taps do not cover it.
    """

    def __init__(self, spatial_dims: int, channels: int, width: int, stride: int = 2) -> None:
        super().__init__()
        self.stride = stride
        self.conv = _TRANSPOSED[spatial_dims](channels, width, 3, stride=stride, output_padding=max(0, stride - 3))

    def forward(self, x: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B W *finer"]:
        """Each side grows by the stride; Keras' ``padding="same"`` crops behind."""
        full = self.conv(x)
        return full[(..., *(slice(size * self.stride) for size in x.shape[2:]))]


class EncoderLevel(nn.Module):
    """Convolution block, at all levels but the first optionally behind the input's own convolved miniature."""

    def __init__(self, spatial_dims: int, channels: int, width: int, dropout: float, pyramid_channels: int) -> None:
        super().__init__()
        self.pyramid = CONVOLUTIONS[spatial_dims](pyramid_channels, width, 3, padding=1) if pyramid_channels else None
        self.block = ConvBlock(spatial_dims, channels + (width if pyramid_channels else 0), width, dropout)

    def forward(self, x: Float[Tensor, "B C *grid"], miniature: Tensor | None) -> Float[Tensor, "B W *grid"]:
        """The block's output; ``miniature`` is the scaled-down input that a level with a pyramid takes in."""
        if self.pyramid is not None:
            x = torch.cat([F.relu(self.pyramid(miniature)), x], 1)
        return self.block(x)


class StemHead(nn.Module):
    """Logits on the input's grid from features on a grid ``stem`` times coarser.

    Features are spread over the voxels that they stand for, and each voxel is judged by them and by its own value: the
    few channels of the first level cannot carry all of its values through the network.
    """

    def __init__(self, spatial_dims: int, channels: int, in_channels: int, out_channels: int, stem: int) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[spatial_dims]
        self.spatial_dims = spatial_dims
        self.stem = stem
        self.spread = convolution(channels, STEM_WIDTH * stem**spatial_dims, 1)
        self.join = convolution(STEM_WIDTH + in_channels, 2 * STEM_WIDTH, 1)
        self.head = convolution(2 * STEM_WIDTH, out_channels, 1)

    def forward(self, x: Float[Tensor, "B F *coarse"], image: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B K *grid"]:
        """Logits at the image's own resolution, from features ``stem`` times coarser and the image."""
        fine = _depth_to_space(self.spread(x), self.stem, self.spatial_dims)
        return self.head(F.relu(self.join(torch.cat([fine, image], 1))))


class AttentionUNet(nn.Module, ABC):
    """What AGUNet and DAUNet share: encoder, input pyramid, heads, grid checks, start values.

    Subclasses set ``self.decoder`` and the heads after the encoder, in the order of the official graph.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        filters: Sequence[int],
        *,
        deep_supervision: bool,
        input_pyramid: bool,
        dropout: float,
        stem: int,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if spatial_dims not in CONVOLUTIONS:
            raise ValueError(f"{name}: spatial_dims must be 2 or 3, got spatial_dims={spatial_dims}")
        if out_channels < 1 or in_channels < 1:
            raise ValueError(
                f"{name}: in_channels and out_channels must be at least 1, got {in_channels} and {out_channels}"
            )
        if len(filters) < 2:
            raise ValueError(f"{name}: filters must name at least two levels, got filters={tuple(filters)}")
        if stem < 1:
            raise ValueError(f"{name}: stem must be at least 1, got stem={stem}")
        self.spatial_dims = spatial_dims
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.filters = tuple(filters)
        self.deep_supervision = deep_supervision
        self.input_pyramid = input_pyramid
        self.dropout = dropout
        self.stem = stem
        channels = in_channels * stem**spatial_dims
        self.encoder = nn.ModuleList()
        for level, (before, width) in enumerate(pairwise((channels, *self.filters[:-1]))):
            miniature = channels if input_pyramid and level else 0
            self.encoder.append(EncoderLevel(spatial_dims, before, width, dropout, miniature))
        self.bottom = ConvBlock(spatial_dims, self.filters[-2], self.filters[-1], dropout)

    def finish(self) -> None:
        """Heads, coarse to fine as they are created officially, and Glorot-uniform start values."""
        widths = self.filters[-2::-1] if self.deep_supervision else self.filters[:1]
        sizes = (self.in_channels, self.out_channels)
        self.heads = nn.ModuleList(
            CONVOLUTIONS[self.spatial_dims](width, self.out_channels, 1)
            if self.stem == 1
            else StemHead(self.spatial_dims, width, *sizes, self.stem)
            for width in widths
        )
        for module in self.modules():
            if isinstance(module, (*CONVOLUTIONS.values(), *_TRANSPOSED.values())):
                nn.init.xavier_uniform_(module.weight)  # pyright: ignore[reportArgumentType]
                if module.bias is not None:
                    nn.init.zeros_(module.bias)  # pyright: ignore[reportArgumentType]

    @property
    def divisor(self) -> int:
        """Every axis of the grid must be a multiple of this."""
        return self.stem * 2 ** len(self.encoder)

    def encode(self, x: Float[Tensor, "B C *grid"]) -> tuple[Float[Tensor, "B F *coarse"], list[Tensor]]:
        """Features of the bottom and the skip connections, finest first."""
        self._check(x)
        x = _space_to_depth(x, self.stem)
        miniature, skips = x, []
        for level in self.encoder:
            x = level(x, miniature)
            skips.append(x)
            x = _POOLS[self.spatial_dims](x, 2)
            if self.input_pyramid:
                miniature = _MEANS[self.spatial_dims](miniature, 2)
        return self.bottom(x), skips

    @abstractmethod
    def decode(self, x: Float[Tensor, "B F *coarse"], skips: list[Tensor]) -> list[Tensor]:
        """Features of all decoder stages, coarse to fine."""

    def forward(self, x: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B K *grid"] | list[Tensor]:
        """Logits; a list, finest first, in training with deep supervision.

        Raises: ValueError if the channels or the number of axes are not the network's, or the grid is not divisible.
        """
        stages = self.decode(*self.encode(x))
        several = self.deep_supervision and self.training
        maps, image = [], x
        for head, stage in zip(reversed(self.heads), reversed(stages), strict=False):
            maps.append(head(stage) if self.stem == 1 else head(stage, image))
            if not several:
                return maps[0]
            image = _MEANS[self.spatial_dims](image, 2)
        return maps

    def _check(self, x: Tensor) -> None:
        name = type(self).__name__
        if x.ndim != self.spatial_dims + 2:
            axes = "B C X Y Z" if self.spatial_dims == 3 else "B C Y X"
            raise ValueError(f"{name}: expected ({axes}), got shape {tuple(x.shape)}")
        if x.shape[1] != self.in_channels:
            raise ValueError(f"{name}: the network reads {self.in_channels} channels, got {x.shape[1]}")
        grid = tuple(x.shape[2:])
        if any(size % self.divisor or not size for size in grid):
            padded = "×".join(str(max(self.divisor, -(-size // self.divisor) * self.divisor)) for size in grid)
            raise ValueError(
                f"{name}: grid {'×'.join(map(str, grid))} is not divisible by {self.divisor}; pad to {padded}"
            )


class AttentionGate(nn.Module):
    """α·e with α = sigmoid(BN(ψ ReLU([BN(W g), BN(W' e)]))): both projections are joined, not added.

    Args:
        channels: of the signal g and of the skip connection e, which have one grid.
        width: of each projection.
    """

    def __init__(self, spatial_dims: int, channels: int, width: int) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[spatial_dims]
        self.signal = nn.Sequential(convolution(channels, width, 1), batch_norm(spatial_dims, width))
        self.skip = nn.Sequential(convolution(channels, width, 1), batch_norm(spatial_dims, width))
        self.psi = nn.Sequential(convolution(2 * width, 1, 1), batch_norm(spatial_dims, 1))

    def weights(self, g: Float[Tensor, "B C *grid"], e: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B 1 *grid"]:
        """α in (0, 1)."""
        joined = torch.cat([self.signal(g), self.skip(e)], 1)
        return torch.sigmoid(self.psi(F.relu(joined)))

    def forward(self, g: Float[Tensor, "B C *grid"], e: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B C *grid"]:
        """The skip connection e weighed by what the gating signal g lets pass."""
        return self.weights(g, e) * e


class GatedStage(nn.Module):
    """Decoder stage: upsample, gate the skip connection by the result, join, convolve."""

    def __init__(self, spatial_dims: int, channels: int, width: int, dropout: float, *, gated: bool) -> None:
        super().__init__()
        self.up = TransposedConv(spatial_dims, channels, width)
        self.norm = batch_norm(spatial_dims, width)
        self.gate = AttentionGate(spatial_dims, width, width // 2) if gated else None
        self.block = ConvBlock(spatial_dims, 2 * width, width, dropout)

    def forward(self, x: Float[Tensor, "B C *coarse"], skip: Float[Tensor, "B W *grid"]) -> Float[Tensor, "B W *grid"]:
        """x brought up to the skip connection's grid, joined with what the gate lets pass of it."""
        signal = F.relu(self.norm(self.up(x)))
        passed = skip if self.gate is None else self.gate(signal, skip)
        return self.block(torch.cat([signal, passed], 1))


class AGUNet(AttentionUNet):
    """U-Net with attention gates; every option can be switched by itself.

    Args:
        spatial_dims: 2 or 3.
        in_channels: C.
        out_channels: K, the number of classes with the background.
        filters: channels of the levels, the bottom last.
        deep_supervision: one head per decoder stage; in training all of them answer.
        input_pyramid: each level also sees the input, averaged to its size.
        attention_gates: False leaves the plain U-Net.
        dropout: share of the channels dropped behind each ReLU of the convolution blocks.
        stem: the input is rearranged from stem^n voxels to channels, so that the network works on a grid stem times
            coarser, and `StemHead` returns to the input's; 1 is the paper's.

    Raises: ValueError for sizes that make no network.
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
        attention_gates: bool = True,
        dropout: float = 0.0,
        stem: int = 1,
    ) -> None:
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
        self.attention_gates = attention_gates
        self.decoder = nn.ModuleList(
            GatedStage(spatial_dims, before, width, dropout, gated=attention_gates)
            for before, width in pairwise(self.filters[::-1])
        )
        self.finish()

    def decode(self, x: Float[Tensor, "B F *coarse"], skips: list[Tensor]) -> list[Tensor]:
        """Features of all decoder stages, coarse to fine."""
        stages = []
        for stage, skip in zip(self.decoder, reversed(skips), strict=True):
            x = stage(x, skip)
            stages.append(x)
        return stages


def _space_to_depth(x: Tensor, factor: int) -> Tensor:
    """(B, C, f·X, …) → (B, C·fⁿ, X, …)."""
    if factor == 1:
        return x
    batch, channels, *grid = x.shape
    dims = len(grid)
    x = x.reshape(batch, channels, *(part for size in grid for part in (size // factor, factor)))
    order = (0, 1, *range(3, 2 * dims + 2, 2), *range(2, 2 * dims + 2, 2))
    return x.permute(order).reshape(batch, channels * factor**dims, *(size // factor for size in grid))


def _depth_to_space(x: Tensor, factor: int, dims: int) -> Tensor:
    """Inverse of :func:`_space_to_depth`."""
    if factor == 1:
        return x
    batch, channels, *grid = x.shape
    x = x.reshape(batch, channels // factor**dims, *(factor,) * dims, *grid)
    order = (0, 1, *(axis for i in range(dims) for axis in (2 + dims + i, 2 + i)))
    return x.permute(order).reshape(batch, channels // factor**dims, *(size * factor for size in grid))


CARD = Card(
    family="AGUNet",
    paper="2101.07715",
    code="https://github.com/dbouget/mri_brain_tumor_segmentation",
    license="BSD-2-Clause",
    test="models/test_agunet.py",
)
ENTRIES = [
    Entry(
        "agunet",
        AGUNet,
        CARD(
            "Attention gates on the skip connections.",
            "Dice 81.6 %, patient-wise F1 95.6 % (600 private volumes)",
        ),
    ),
    Entry(
        "agunet_full",
        partial(AGUNet, input_pyramid=True, deep_supervision=True),
        CARD("Attention gates, input pyramid, deep supervision."),
    ),
    Entry(
        "agunet_small",
        partial(AGUNet, filters=(16, 32, 64), stem=2),
        CARD("Three levels on half the grid, the last look at full size, for small machines."),
    ),
    Entry("test_agunet", partial(AGUNet, filters=(4, 8, 16)), CARD("For tests.")),
]
