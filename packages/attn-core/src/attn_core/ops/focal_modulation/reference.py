"""The equation of :func:`attn_core.focal_modulation`."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def focal_modulation(ctx: Tensor, gates: Tensor, weights: Sequence[Tensor], *, normalize: bool = False) -> Tensor:
    """z_0 = ctx; z_l = gelu(W_l ∗ z_{l−1}); y = Σ_l z_l g_l + gelu(mean z_L) g_{L+1}, ÷ (L+1) with ``normalize``."""
    return per_image(ctx, gates, [weight[None] for weight in weights], normalize)


def per_image(ctx: Tensor, gates: Tensor, weights: Sequence[Tensor], normalize: bool) -> Tensor:
    """The same with weights (B|1, C, 1, k, k)."""
    dtype = torch.float64 if ctx.dtype == torch.float64 else torch.float32
    B, C, H, W = ctx.shape
    if ctx.numel() == 0:  # which conv2d refuses
        return torch.zeros_like(ctx)
    z, g = ctx.to(dtype), gates.to(dtype)
    y = torch.zeros_like(z)
    for level, weight in enumerate(weights):
        kernels = weight.to(dtype).expand(B, -1, -1, -1, -1).reshape(B * C, 1, *weight.shape[3:])
        # Images side by side as channels: each has kernels of its own.
        u = F.conv2d(z.reshape(1, B * C, H, W), kernels, padding=weight.shape[-1] // 2, groups=B * C)
        z = _gelu(u.reshape(B, C, H, W))
        y = y + z * g[:, level : level + 1]
    y = y + _gelu(z.sum((2, 3), keepdim=True) / (H * W)) * g[:, len(weights) :]
    return (y / (len(weights) + 1) if normalize else y).to(ctx.dtype)


def _gelu(u: Tensor) -> Tensor:
    return u / 2 * (1 + torch.erf(u / math.sqrt(2)))
