"""The equations of :func:`attn_core.group_attention`, with the N×M scores in full."""

import math

import torch
from torch import Tensor

from attn_core.ops.attention.reference import softmax_with_lse


def group_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Tensor,
    num_groups: int,
    *,
    group_weight: Tensor | None = None,
    group_gate: Tensor | None = None,
    scale: float | None = None,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: str | None = None,
) -> tuple[Tensor, Tensor]:
    """L_ig = log Σ_{j∈g} exp s_ij;  o_ig = Σ_{j∈g} exp(s_ij − L_ig) v_j;  out_i = Σ_g W_ig o_ig.

    W = softmax(L) over the groups, or ``group_weight``, or the softmax of ``group_gate`` where L is finite.
    """
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    repeat = q.shape[1] // k.shape[1]
    K, V = (x.to(dtype).repeat_interleave(repeat, dim=1) for x in (k, v))
    s = torch.einsum("bhid,bhjd->bhij", q.to(dtype), K) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        s = s + bias.to(dtype)
    visible = torch.ones(s.shape[-2:], dtype=torch.bool, device=q.device)
    if causal is not None:
        visible = visible.tril(0 if causal == "upper_left" else k.shape[2] - q.shape[2])
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    outs, masses = [], []
    for g in range(num_groups):
        member = (group == g)[:, None, None, :]
        p, L = softmax_with_lse(s.masked_fill(~(visible & member), -math.inf))
        outs.append(torch.einsum("bhij,bhjd->bhid", p, V))
        masses.append(L)
    o, L = torch.stack(outs, dim=-2), torch.stack(masses, dim=-1)  # (B, H, N, G, Dv), (B, H, N, G)
    if group_weight is not None:
        W = group_weight
    elif group_gate is not None:
        W, _ = softmax_with_lse(group_gate.expand_as(L).masked_fill(L.isneginf(), -math.inf))
    else:
        W, _ = softmax_with_lse(L)
    return (W.unsqueeze(-1) * o).sum(-2).to(q.dtype), L
