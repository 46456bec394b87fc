"""The equation of :func:`attn_core.neighborhood_attention`, with the scores of all pairs; arguments of all backends."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attn_core.kernels.registration import Definition, token_major
from attn_core.ops.attention.reference import softmax_with_lse

from .windows import outer


class Arguments(NamedTuple):
    """q, k, v (B, H, N, D) with the cells of the grid row-major, rpb (1, H, …); one rule for each axis."""

    q: Tensor
    k: Tensor
    v: Tensor
    rpb: Tensor | None
    grid: Sequence[int]
    kernel_size: Sequence[int]
    dilation: Sequence[int]
    stride: Sequence[int]
    is_causal: Sequence[bool]
    scale: float
    border: str


def reference(a: Arguments) -> tuple[Tensor, Tensor]:
    """s_ij = scale·q_i·k_j + rpb[(j − i)/dilation + kernel − 1] over the j that every axis lets i see."""
    q, k, v, rpb, grid, kernel, dilated, strided, causal, scale, border = a
    visible = torch.ones(1, 1, dtype=torch.bool, device=q.device)
    index = torch.zeros(1, 1, dtype=torch.int64, device=q.device)
    for axis, length in enumerate(grid):
        i = torch.arange(length, device=q.device)
        seen = _visible(i, length, kernel[axis], dilated[axis], strided[axis], causal[axis], border)
        visible = outer(visible, seen, torch.logical_and)
        offset = (i - i[:, None]) // dilated[axis] + kernel[axis] - 1
        index = outer(index * (2 * kernel[axis] - 1), offset.clamp(0, 2 * kernel[axis] - 2), torch.add)

    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    Q, K, V = (x.to(dtype) for x in (q, k, v))
    s = torch.einsum("bhid,bhjd->bhij", Q, K) * scale
    if rpb is not None:
        s = s + rpb.to(dtype).flatten(-len(grid))[..., index]
    p, lse = softmax_with_lse(s.masked_fill(~visible, -math.inf))
    return torch.einsum("bhij,bhjd->bhid", p, V).to(q.dtype), lse


def _visible(i: Tensor, length: int, kernel: int, dilation: int, stride: int, causal: bool, border: str) -> Tensor:
    """(length, length): what query i, a row, sees along one axis."""
    p, residue = i // dilation, i % dilation
    n = (length - residue + dilation - 1) // dilation
    leader = torch.minimum(p // stride * stride + (stride - 1 if causal else stride // 2), n - 1)
    left, right = kernel // 2, kernel // 2 + kernel % 2 - 1
    if causal:
        first, last = leader - kernel + 1, p
    elif border == "shifted":
        first = (leader - left).clamp(min=0) + (leader + right >= n) * (n - right - leader - 1)
        last = first + kernel - 1
    else:
        first, last = leader - left, leader + right
    same = residue[:, None] == residue
    return same & (first[:, None] <= p) & (p <= last[:, None])


def fake(a: Arguments) -> tuple[Tensor, Tensor]:
    """Uninitialized out (B, H, cells, D_v) and lse (B, H, cells)."""
    q = a.q
    batch, heads, cells, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return token_major(q, batch, heads, cells, a.v.shape[3]), q.new_empty(batch, heads, cells, dtype=dtype)


NEIGHBORHOOD_ATTENTION = Definition(
    "neighborhood_attention",
    Arguments,
    fake,
    reference,
    differentiable=("q", "k", "v", "rpb"),
    token_major_gradients=("q", "k", "v"),
)
