"""Deformable convolution v2: a convolution that learns where to read, and how much of what it reads counts.

Paper: Zhu et al., Deformable ConvNets v2, CVPR 2019, arXiv 1811.11168. Parameters under the names of mmcv's
``ModulatedDeformConv2dPack`` (``weight``, ``bias``, ``conv_offset``), as official checkpoints have them; the operator
is torchvision's, on CPU and GPU. Checked in: ``layers/test_deformable_conv.py``.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class ModulatedDeformConv(nn.Conv2d):
    """A convolution in the place of ``conv``, whose weights it takes; offsets start at 0, all masks at ½.

    Args:
        conv: square kernel, zero padding.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        side = conv.kernel_size[0]
        layout: Any = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        if conv.kernel_size != (side, side) or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            raise ValueError(f"ModulatedDeformConv: conv must have a square kernel and zero padding, got {conv}")
        super().__init__(
            conv.in_channels, conv.out_channels, side, groups=conv.groups, bias=conv.bias is not None, **layout
        )
        self.weight, self.bias = conv.weight, conv.bias
        self.conv_offset = nn.Conv2d(conv.in_channels, 3 * side**2, side, **layout)
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)  # pyright: ignore[reportArgumentType]

    def forward(self, input: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B K y x"]:
        """Reads at k² learned offsets of each place, each weighed by a sigmoid."""
        reads = self.kernel_size[0] ** 2
        offsets, mask = self.conv_offset(input).split([2 * reads, reads], 1)
        layout: Any = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        return deform_conv2d(input, offsets, self.weight, self.bias, mask=mask.sigmoid(), **layout)
