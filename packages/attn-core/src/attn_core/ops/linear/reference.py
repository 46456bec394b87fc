"""The equation of :func:`attn_core.linear`."""

import math

import torch
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """y = x Wᵀ + b;  gelu(y) = y/2·(1 + erf(y/√2))."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = torch.einsum("...i,oi->...o", x.to(dtype), weight.to(dtype))
    if bias is not None:
        y = y + bias.to(dtype)
    if activation == "gelu":
        y = y / 2 * (1 + torch.erf(y / math.sqrt(2)))
    return y.to(x.dtype)
