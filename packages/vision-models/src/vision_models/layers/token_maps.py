"""Layers that several families share: token maps stay (B, Y, X, C) in memory from the image to the head."""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function, register_notrace_module
from torch import Tensor, nn

from attn_core.nn import Linear as Linear
from attn_core.nn import through_gelu as through_gelu
from vision_models.initialization import trunc_normal_


@register_notrace_function
def pad_to_multiple(x: Tensor, rows: int, columns: int) -> Tensor:
    """Zero rows below and columns to the right of (B, Y, X, C), up to multiples of ``rows`` and ``columns``.

    A graph being exported pads always, by nothing too: its height and width are not known yet.
    """
    if rows == columns == 1:
        return x
    bottom, right = (rows - x.shape[1] % rows) % rows, (columns - x.shape[2] % columns) % columns
    padded = torch.compiler.is_exporting() or bottom > 0 or right > 0
    return F.pad(x, (0, 0, 0, right, 0, bottom)) if padded else x


@register_notrace_function
def pad_map(x: Tensor, multiple: int) -> Tensor:
    """Zeros below and to the right of (B, C, Y, X), up to a multiple on both sides."""
    return pad_to_multiple(x.permute(0, 2, 3, 1), multiple, multiple).permute(0, 3, 1, 2)


@register_notrace_function
def to_windows(x: Tensor, rows: int, columns: int) -> Tensor:
    """(B, Y, X, C) → (B·windows, rows·columns, C); the map is padded with zeros below and to the right."""
    x = pad_to_multiple(x, rows, columns)
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // rows, rows, width // columns, columns, channels)
    return x.transpose(2, 3).reshape(-1, rows * columns, channels)


@register_notrace_function
def from_windows(windows: Tensor, rows: int, columns: int, like: Tensor) -> Tensor:
    """Inverse of :func:`to_windows` for the map ``like``, padding cut off."""
    batch, height, width = like.shape[:3]
    down, across = -(-height // rows), -(-width // columns)
    x = windows.view(batch, down, across, rows, columns, windows.shape[2]).transpose(2, 3)
    return x.reshape(batch, down * rows, across * columns, windows.shape[2])[:, :height, :width]


register_notrace_module(Linear)


@register_notrace_module  # or FX would find different graphs for training and evaluation
class DepthwiseConv(nn.Conv2d):
    """Depthwise convolution of a token map (B, Y, X, C); both permutations are views of channels-last memory."""

    def __init__(self, dim: int, kernel: int, **dd: Any) -> None:
        super().__init__(dim, dim, kernel, padding=kernel // 2, groups=dim, **dd)

    def forward(self, input: Tensor) -> Tensor:
        """(B, Y, X, C) → (B, Y', X', C)."""
        x, bias = input.permute(0, 3, 1, 2), self.bias
        if self.training and bias is not None:
            # oneDNN's gradient of the bias doubles the time of the backward pass; that of an addition is free.
            return self._conv_forward(x, self.weight, None).permute(0, 2, 3, 1) + bias
        return self._conv_forward(x, self.weight, bias).permute(0, 2, 3, 1)


class Mlp(nn.Module):
    """Linear, GELU, linear. (B, Y, X, dim) → same."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden, **dd)
        self.fc2 = Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(…, C) → (…, C)."""
        return self.fc2(through_gelu(self.fc1, x))


def init_linear(module: nn.Module) -> None:
    """Truncated normal weights (0.02) and zero biases of linear layers, the start of every family here."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
