"""Feature pyramids on timm's backbones, and anchors without rounding: what the hosts of BVR are built on.

Checked in: ``models/bvr/test_hosts.py``. Shapes: images (B, 3, Y, X) → a dict of maps (B, C, Y / stride, X / stride).
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock

from detection.layers.deformable_conv import ModulatedDeformConv

Extra = Literal["input", "output", "subsample"]
STRIDES = (8, 16, 32, 64, 128)
Maps = list[Tensor]


def group_norm(channels: int) -> nn.GroupNorm:
    """8 channels in a group, as the published 32 groups of 256 channels; more where there are more."""
    return nn.GroupNorm(math.gcd(channels, min(32, max(1, channels // 8))), channels)


class PyramidExtension(ExtraFPNBlock):
    """Further levels: every other cell, or 3×3 convolutions of stride 2 from the backbone's or the pyramid's last."""

    def __init__(self, in_channels: int, channels: int, levels: int, *, source: Extra, norm: bool) -> None:
        super().__init__()
        self.source, self.levels = source, levels
        self.convs = nn.ModuleList()
        for level in range(0 if source == "subsample" else levels):
            first = in_channels if source == "input" and level == 0 else channels
            layers: list[nn.Module] = [nn.Conv2d(first, channels, 3, stride=2, padding=1, bias=not norm)]
            self.convs.append(nn.Sequential(*layers, *([group_norm(channels)] if norm else [])))

    def forward(self, results: Maps, x: Maps, names: list[str]) -> tuple[Maps, list[str]]:
        """The maps and names with ``levels`` coarser ones behind them, as torchvision calls an extra block."""
        last = x[-1] if self.source == "input" else results[-1]
        for level in range(self.levels):
            last = self.convs[level](last) if len(self.convs) else F.max_pool2d(last, 1, stride=2)
            results, names = [*results, last], [*names, f"extra{level}"]
        return results, names


class PyramidBackbone(nn.Module):
    """A timm backbone with a feature pyramid, as torchvision's detectors take it (``out_channels``, dict of maps).

    Args:
        backbone: timm name, built without weights. channels: of the pyramid.
        strides: of the levels; those beyond the backbone's last are added by convolutions.
        extra: where added levels come from. norm: group norm in the pyramid. norm_eval: keep the backbone's batch
            norms in eval mode, as for fine-tuning on few images. backbone_options: of timm's builder.
        deformable: the 3×3 convolutions of a ResNet's last three stages are deformable (v2).

    Raises: ValueError if the backbone has no map of the first stride, strides do not double, or it should be deformable
        and is no ResNet.
    """

    def __init__(
        self,
        backbone: str = "resnet50",
        channels: int = 256,
        strides: Sequence[int] = STRIDES,
        *,
        extra: Extra = "input",
        norm: bool = True,
        norm_eval: bool = True,
        backbone_options: Mapping[str, Any] | None = None,
        deformable: bool = False,
    ) -> None:
        super().__init__()
        options = dict(backbone_options or {})
        maps: Any = timm.create_model(backbone, features_only=True, **options)
        have = maps.feature_info.reduction()
        if strides[0] not in have or any(b != 2 * a for a, b in pairwise(strides)):
            raise ValueError(
                f"PyramidBackbone: strides must double, from one of {have}, got strides={tuple(strides)} of {backbone}"
            )
        # The deepest map of each stride: a dilated backbone has several.
        levels = tuple(len(have) - 1 - have[::-1].index(stride) for stride in strides if stride in have)
        self.body: Any = timm.create_model(backbone, features_only=True, out_indices=levels, **options)
        if deformable:
            self._deform(backbone)
        widths = self.body.feature_info.channels()
        self.out_channels = channels
        self.norm_eval = norm_eval
        self.levels = len(levels)
        added = len(strides) - self.levels
        self.fpn = FeaturePyramidNetwork(
            widths,
            channels,
            PyramidExtension(widths[-1], channels, added, source=extra, norm=norm) if added else None,
            norm_layer=group_norm if norm else None,
        )

    def _deform(self, backbone: str) -> None:
        blocks = [block for name in ("layer2", "layer3", "layer4") for block in getattr(self.body, name, ())]
        if not blocks or not all(isinstance(getattr(block, "conv2", None), nn.Conv2d) for block in blocks):
            raise ValueError(f"PyramidBackbone: deformable=True needs a ResNet or ResNeXt, got backbone={backbone!r}")
        for block in blocks:
            block.conv2 = ModulatedDeformConv(block.conv2)

    def train(self, mode: bool = True) -> "PyramidBackbone":
        """Batch norms of the body stay in eval mode with ``norm_eval``."""
        super().train(mode)
        if self.norm_eval:
            for module in self.body.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self

    def forward(self, x: Float[Tensor, "B 3 Y X"]) -> OrderedDict[str, Tensor]:
        """One map (B, C, y, x) for each level, finest first, under the names "0", "1", …."""
        return self.fpn(OrderedDict((str(i), level) for i, level in enumerate(self.body(x))))


class ExactAnchors(AnchorGenerator):
    """Anchors without rounding, moved by ``offset`` strides from the corner of their cell."""

    def __init__(self, sizes: Sequence[Sequence[float]], ratios: Sequence[float], *, offset: float = 0.0) -> None:
        self.offset = offset
        super().__init__(tuple(tuple(s) for s in sizes), (tuple(ratios),) * len(sizes))

    def generate_anchors(
        self, scales: Any, aspect_ratios: Any, dtype: torch.dtype = torch.float32, device: Any = "cpu"
    ) -> Tensor:
        """(ratios · scales, 4) boxes around (0, 0), ratio-major."""
        root = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        scale = torch.as_tensor(scales, dtype=dtype, device=device)
        w, h = (scale / root.unsqueeze(1)).flatten(), (scale * root.unsqueeze(1)).flatten()
        return torch.stack([-w, -h, w, h], 1) / 2

    def grid_anchors(self, grid_sizes: list[list[int]], strides: list[list[Tensor]]) -> list[Tensor]:
        """Anchors (cells, 4) of each level in pixels, moved by ``offset`` strides."""
        anchors = super().grid_anchors(grid_sizes, strides)
        if not self.offset:
            return anchors
        return [a + float(int(step[0]) * self.offset) for a, step in zip(anchors, strides, strict=True)]
