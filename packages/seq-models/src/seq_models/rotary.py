"""Rotary position embedding, pairs of neighboring channels (Su et al. 2021, arXiv 2104.09864)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotate(
    x: Float[Tensor, "*batch N D"], position: Int[Tensor, "*#batch N"], theta: float
) -> Float[Tensor, "*batch N D"]:
    """Turn channels 2i and 2i + 1 of each token by position·theta^(−2i/D); angles are computed in float32 at least."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    width = x.shape[-1]
    frequency = theta ** (torch.arange(0, width, 2, device=x.device, dtype=exact) / -width)
    angle = position.to(exact)[..., None] * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)
