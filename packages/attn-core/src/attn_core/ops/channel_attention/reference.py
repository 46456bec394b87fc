"""The equation of :func:`attn_core.channel_attention`."""

import torch
from torch import Tensor


def channel_attention(
    a: Tensor, b: Tensor, x: Tensor, *, scale: float = 1.0, negate_max: bool = False, transpose: bool = False
) -> Tensor:
    """E = scale·aᵀb, or max_d E_cd − E with ``negate_max``; A = softmax_d(E); y = x Aᵀ, or x A with ``transpose``."""
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    E = torch.einsum("bhnc,bhnd->bhcd", a.to(dtype), b.to(dtype)) * scale
    if negate_max:
        E = E.amax(-1, keepdim=True) - E
    A = torch.softmax(E, dim=-1)
    if transpose:
        y = torch.einsum("bhnc,bhcd->bhnd", x.to(dtype), A)
    else:
        y = torch.einsum("bhnd,bhcd->bhnc", x.to(dtype), A)
    return y.to(x.dtype)
