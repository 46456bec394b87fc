"""The equation of :func:`attn_core.additive_attention`, with the N×M×D tensor in full."""

import math

import torch
from torch import Tensor

from attn_core.ops.attention.reference import softmax_with_lse


def additive_attention(
    q: Tensor, k: Tensor, w: Tensor, value: Tensor | None = None, *, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """s_ij = Σ_d w_d tanh(q_id + k_jd); scores s, or out = softmax(s) value; lse = log Σ_j exp s_ij."""
    return per_batch(q, k, w[None], value, key_mask)


def per_batch(q: Tensor, k: Tensor, w: Tensor, value: Tensor | None, key_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same with w (B|1, D)."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    t = torch.tanh(q.to(dtype)[:, :, None] + k.to(dtype)[:, None])
    s = torch.einsum("bijd,bd->bij", t, w.to(dtype).expand(q.shape[0], -1))
    if key_mask is not None:
        s = s.masked_fill(~key_mask[:, None], -math.inf)
    p, lse = softmax_with_lse(s)
    result = s if value is None else torch.einsum("bij,bje->bie", p, value.to(dtype))
    return result.to(q.dtype), lse
