"""The equation of :func:`attn_core.neighborhood_attention`, with the scores of all pairs of cells."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attn_core.ops.attention.reference import softmax_with_lse

from .windows import outer, per_axis


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernel_size: int | Sequence[int],
    *,
    dilation: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
    is_causal: bool | Sequence[bool] = False,
    scale: float | None = None,
    rpb: Tensor | None = None,
    border: str = "shifted",
) -> tuple[Tensor, Tensor]:
    """s_ij = scale·q_i·k_j + rpb[(j − i)/dilation + kernel − 1] over the j that every axis lets i see."""
    grid = q.shape[2:-1]
    kernel, dilated, strided, causal = (per_axis(x, len(grid)) for x in (kernel_size, dilation, stride, is_causal))
    visible = torch.ones(1, 1, dtype=torch.bool, device=q.device)
    index = torch.zeros(1, 1, dtype=torch.int64, device=q.device)
    for axis, length in enumerate(grid):
        i = torch.arange(length, device=q.device)
        seen = _visible(i, length, kernel[axis], dilated[axis], strided[axis], causal[axis], border)
        visible = outer(visible, seen, torch.logical_and)
        offset = (i - i[:, None]) // dilated[axis] + kernel[axis] - 1
        index = outer(index * (2 * kernel[axis] - 1), offset.clamp(0, 2 * kernel[axis] - 2), torch.add)

    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    Q, K, V = (x.to(dtype).flatten(2, -2) for x in (q, k, v))
    s = torch.einsum("bhid,bhjd->bhij", Q, K) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if rpb is not None:
        s = s + rpb.to(dtype).flatten(-len(grid))[..., index]
    p, lse = softmax_with_lse(s.masked_fill(~visible, -math.inf))
    out = torch.einsum("bhij,bhjd->bhid", p, V).to(q.dtype)
    return out.unflatten(2, grid), lse.unflatten(2, grid)


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
