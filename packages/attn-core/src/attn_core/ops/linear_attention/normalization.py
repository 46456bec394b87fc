"""Normalized linear attention as the plain one on values with a column of ones, whose output is the denominator."""

import torch
import torch.nn.functional as F
from torch import Tensor


def with_ones(v: Tensor) -> Tensor:
    """v (…, D) with a column of ones: its weighted sum is the denominator."""
    return F.pad(v, (0, 1), value=1.0)


def normalized_gradient(grad_out: Tensor, out: Tensor, denominator: Tensor) -> Tensor:
    """Gradient of the raw output, whose last column is the denominator's: dO/z and −dO·O/z."""
    wide = grad_out.to(denominator.dtype) / denominator.unsqueeze(-1)
    return torch.cat([wide, -(wide * out).sum(-1, keepdim=True)], dim=-1)
