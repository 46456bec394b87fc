"""Layers that several families share: token maps stay (B, Y, X, C) in memory from the image to the head."""

# pyright: reportPrivateImportUsage=false
# (torch.jit.is_scripting is public, though torch.jit does not list it)

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from attn_core import nn as core_nn
from attn_core.ops.linear import linear


@register_notrace_function
def pad_to_multiple(x: Tensor, rows: int, columns: int) -> Tensor:
    """Zero rows below and columns to the right of (B, Y, X, C), up to multiples of ``rows`` and ``columns``."""
    bottom, right = -x.shape[1] % rows, -x.shape[2] % columns
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if bottom > 0 or right > 0 else x


@register_notrace_module
class Linear(core_nn.Linear):
    """``attn_core.nn.Linear`` for models that timm's tools take apart: scriptable, and one node for FX."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            out = F.linear(input, self.weight, self.bias)
            return out if self.activation is None else F.gelu(out)
        else:
            return linear(input, self.weight, self.bias, self.activation)


@register_notrace_module  # or FX would find different graphs for training and evaluation
class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of a token map (B, Y, X, C); both permutations are views of channels-last memory."""

    def __init__(self, dim: int, kernel: int, **dd: Any) -> None:
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim, **dd)

    def forward(self, input: Tensor) -> Tensor:
        x, bias = input.permute(0, 3, 1, 2), self.bias
        if self.training and bias is not None:
            # oneDNN's gradient of the bias doubles the time of the backward pass; that of an addition is free.
            return self._conv_forward(x, self.weight, None).permute(0, 2, 3, 1) + bias
        return self._conv_forward(x, self.weight, bias).permute(0, 2, 3, 1)
