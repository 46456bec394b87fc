"""The equations of :func:`attn_core.group_attention`, with the N×M scores in full, and all backends' arguments."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from attn_core.kernels.registration import Definition, token_major
from attn_core.ops.attention.reference import softmax_with_lse


class Arguments(NamedTuple):
    """As the public function's; mode says what factor holds: "weight" or "gate", or "mass" without one."""

    q: Tensor
    k: Tensor
    v: Tensor
    group: Tensor
    factor: Tensor | None
    bias: Tensor | None
    key_mask: Tensor | None
    num_groups: int
    scale: float
    causal: str  # "none", "upper_left" or "lower_right"
    mode: str

    @property
    def accumulator(self) -> torch.dtype:
        """The dtype of sums and of lse: float64 for float64 operands, else float32."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32

    @property
    def offset(self) -> int | None:
        """A query i sees the keys up to i + offset."""
        if self.causal == "none":
            return None
        return 0 if self.causal == "upper_left" else self.k.shape[2] - self.q.shape[2]


def reference(a: Arguments) -> tuple[Tensor, Tensor]:
    """L_ig = log Σ_{j∈g} exp s_ij;  o_ig = Σ_{j∈g} exp(s_ij − L_ig) v_j;  out_i = Σ_g W_ig o_ig.

    W = softmax(L) over the groups, or ``group_weight``, or the softmax of ``group_gate`` where L is finite.
    """
    q, k, v = a.q, a.k, a.v
    Q, K, V = q.to(a.accumulator), *(x.to(a.accumulator).repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    s = torch.einsum("bhid,bhjd->bhij", Q, K) * a.scale
    if a.bias is not None:
        s = s + a.bias.to(s.dtype)
    visible = torch.ones(s.shape[-2:], dtype=torch.bool, device=q.device)
    if a.offset is not None:
        visible = visible.tril(a.offset)
    if a.key_mask is not None:
        visible = visible & a.key_mask[:, None, None, :]
    outs, masses = [], []
    for g in range(a.num_groups):
        member = (a.group == g)[:, None, None, :]
        p, L = softmax_with_lse(s.masked_fill(~(visible & member), -math.inf))
        outs.append(torch.einsum("bhij,bhjd->bhid", p, V))
        masses.append(L)
    o, L = torch.stack(outs, dim=-2), torch.stack(masses, dim=-1)  # (B, H, N, G, Dv), (B, H, N, G)
    if a.factor is None:
        W, _ = softmax_with_lse(L)
    elif a.mode == "weight":
        W = a.factor
    else:
        W, _ = softmax_with_lse(a.factor.expand_as(L).masked_fill(L.isneginf(), -math.inf))
    return (W.unsqueeze(-1) * o).sum(-2).to(q.dtype), L


def fake(a: Arguments) -> tuple[Tensor, Tensor]:
    """Uninitialized out (B, H, N, D_v) and lse of each group (B, H, N, G)."""
    batch, heads, queries, _ = a.q.shape
    out = token_major(a.q, batch, heads, queries, a.v.shape[-1])
    return out, a.q.new_empty(batch, heads, queries, a.num_groups, dtype=a.accumulator)


GROUP_ATTENTION = Definition(
    "group_attention",
    Arguments,
    fake,
    reference,
    differentiable=("q", "k", "v", "factor", "bias"),
    token_major_gradients=("q", "k", "v"),
)
