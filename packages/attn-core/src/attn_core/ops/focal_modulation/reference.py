"""The equation of :func:`attn_core.focal_modulation`, and the arguments of all its backends."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core.kernels.registration import Definition


class Arguments(NamedTuple):
    """ctx (B, Y, X, C), gates (B, Y, X, L + 1), weights (B|1, C, 1, k, k): contiguous results are channels-last."""

    ctx: Tensor
    gates: Tensor
    weights: Sequence[Tensor]
    normalize: bool


def reference(a: Arguments) -> Tensor:
    """z_0 = ctx; z_l = gelu(W_l ∗ z_{l−1}); y = Σ_l z_l g_l + gelu(mean z_L) g_{L+1}, ÷ (L+1) with ``normalize``."""
    if a.ctx.numel() == 0:  # which conv2d refuses
        return torch.zeros_like(a.ctx)
    ctx, gates = a.ctx.permute(0, 3, 1, 2), a.gates.permute(0, 3, 1, 2)
    dtype = torch.float64 if ctx.dtype == torch.float64 else torch.float32
    B, C, H, W = ctx.shape
    z, g = ctx.to(dtype), gates.to(dtype)
    y = torch.zeros_like(z)
    for level, weight in enumerate(a.weights):
        kernels = weight.to(dtype).expand(B, -1, -1, -1, -1).reshape(B * C, 1, *weight.shape[3:])
        # Images side by side as channels: each has kernels of its own.
        u = F.conv2d(z.reshape(1, B * C, H, W), kernels, padding=weight.shape[-1] // 2, groups=B * C)
        z = _gelu(u.reshape(B, C, H, W))
        y = y + z * g[:, level : level + 1]
    y = y + _gelu(z.sum((2, 3), keepdim=True) / (H * W)) * g[:, len(a.weights) :]
    y = y / (len(a.weights) + 1) if a.normalize else y
    return y.permute(0, 2, 3, 1).to(ctx.dtype)


def _gelu(u: Tensor) -> Tensor:
    return u / 2 * (1 + torch.erf(u / math.sqrt(2)))


def fake(a: Arguments) -> Tensor:
    """Uninitialized modulator (B, Y, X, C)."""
    return torch.empty_like(a.ctx, memory_format=torch.contiguous_format)


FOCAL_MODULATION = Definition(
    "focal_modulation",
    Arguments,
    fake,
    reference,
    differentiable=("ctx", "gates", "weights"),
    keeps_outputs=False,
)
