"""The equation of :func:`attn_core.channel_attention`, and the arguments of all its backends."""

from typing import NamedTuple

import torch
from torch import Tensor

from attn_core.kernels.registration import Definition, token_major


class Arguments(NamedTuple):
    """a, b, x (B, H, N, C); under vmap one of them may have a single image for all."""

    a: Tensor
    b: Tensor
    x: Tensor
    scale: float
    negate_max: bool
    transpose: bool


def reference(problem: Arguments) -> Tensor:
    """E = scale·aᵀb, or max_d E_cd − E with ``negate_max``; A = softmax_d(E); y = x Aᵀ, or x A with ``transpose``."""
    a, b, x, scale, negate_max, transpose = problem
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


def fake(problem: Arguments) -> tuple[Tensor, Tensor]:
    """y and the weights A, which backward needs."""
    a = problem.a
    batch, heads, tokens, width = a.shape
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return token_major(a, batch, heads, tokens, width), a.new_empty(batch, heads, width, width, dtype=dtype)


CHANNEL_ATTENTION = Definition(
    "channel_attention",
    Arguments,
    fake,
    reference,
    differentiable=("a", "b", "x"),
    token_major_gradients=("a", "b", "x"),
    residuals=1,
    keeps_outputs=False,
)
