"""Rotary position embedding, pairs of neighboring channels (Su et al. 2021, arXiv 2104.09864)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotate(
    x: Float[Tensor, "*batch N D"], position: Int[Tensor, "*#batch N"], theta: float
) -> Float[Tensor, "*batch N D"]:
    """Turn channels 2i and 2i + 1 of each token by position·theta^(−2i/D); angles are computed in float32 at least.

    Of an odd width the last channel stays.
    """
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    paired = x.shape[-1] // 2 * 2
    frequency = theta ** (torch.arange(0, paired, 2, device=x.device, dtype=exact) / -x.shape[-1])
    angle = position.to(exact)[..., None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    even, odd = x[..., 0:paired:2], x[..., 1:paired:2]
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
    return turned if paired == x.shape[-1] else torch.cat([turned, x[..., paired:]], dim=-1)
