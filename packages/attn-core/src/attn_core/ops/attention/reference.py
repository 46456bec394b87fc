"""The equation of :func:`attn_core.attention`, with the N×M scores in full."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    bias: Tensor | None = None,
    axis_bias: Sequence[Tensor] | None = None,
    key_mask: Tensor | None = None,
    causal: str | None = None,
) -> tuple[Tensor, Tensor]:
    """s_ij = scale·q_i·k_j + bias_ij + Σ_a T_a[i, coord_a(j)];  out = softmax(s) v;  lse = log Σ_j exp s_ij."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k.shape[1]
    K, V = (x.to(dtype).repeat_interleave(group, dim=1) for x in (k, v))
    s = torch.einsum("bhid,bhjd->bhij", q.to(dtype), K) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        s = s + bias.to(dtype)
    if axis_bias:
        s = s + expand_axis_bias([table.to(dtype) for table in axis_bias])
    visible = torch.ones(s.shape[-2:], dtype=torch.bool, device=q.device)
    if causal is not None:
        visible = visible.tril(0 if causal == "upper_left" else k.shape[2] - q.shape[2])
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    p, lse = softmax_with_lse(s.masked_fill(~visible, -math.inf))
    return torch.einsum("bhij,bhjd->bhid", p, V).to(q.dtype), lse


def expand_axis_bias(tables: Sequence[Tensor]) -> Tensor:
    """Σ_a T_a[…, coord_a(j)] over the row-major grid of the tables' last dimensions: (…, Π n_a)."""
    total = tables[0]
    for table in tables[1:]:
        total = (total.unsqueeze(-1) + table.unsqueeze(-2)).flatten(-2)
    return total


def softmax_with_lse(s: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax and log-sum-exp of the last dimension; a row of −inf alone gives 0, −inf and zero gradients."""
    if s.shape[-1] == 0:
        return s, s.new_full(s.shape[:-1], -math.inf)
    # The maximum cancels from both results, so it carries no gradient.
    m = s.detach().amax(-1, keepdim=True)
    m = m.masked_fill(m == -math.inf, 0.0)
    e = torch.exp(s - m)
    total = e.sum(-1, keepdim=True)
    dead = total == 0
    total = total.masked_fill(dead, 1.0)
    return e / total, (total.log() + m).masked_fill(dead, -math.inf).squeeze(-1)
