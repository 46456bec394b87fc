"""The equation of :func:`attn_core.additive_attention`, with the N×M×D tensor in full; arguments of all backends."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from attn_core.kernels.registration import Definition
from attn_core.ops.attention.reference import softmax_with_lse


class Arguments(NamedTuple):
    """q (B, N, D), k (B, M, D), w (1, D), value (B, M, E), key_mask (B|1, M); under vmap w has B rows."""

    q: Tensor
    k: Tensor
    w: Tensor
    value: Tensor | None
    key_mask: Tensor | None


def reference(a: Arguments) -> tuple[Tensor, Tensor]:
    """s_ij = Σ_d w_d tanh(q_id + k_jd); scores s, or out = softmax(s) value; lse = log Σ_j exp s_ij."""
    q, k, w, value, key_mask = a
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    t = torch.tanh(q.to(dtype)[:, :, None] + k.to(dtype)[:, None])
    s = torch.einsum("bijd,bd->bij", t, w.to(dtype).expand(q.shape[0], -1))
    if key_mask is not None:
        s = s.masked_fill(~key_mask[:, None], -math.inf)
    p, lse = softmax_with_lse(s)
    result = s if value is None else torch.einsum("bij,bje->bie", p, value.to(dtype))
    return result.to(q.dtype), lse


def fake(a: Arguments) -> tuple[Tensor, Tensor]:
    """Uninitialized result (B, N, M), or (B, N, E) with values, and lse (B, N)."""
    q, k, _, value, _ = a
    batch, queries, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    width = k.shape[1] if value is None else value.shape[2]
    return q.new_empty(batch, queries, width), q.new_empty(batch, queries, dtype=dtype)


ADDITIVE_ATTENTION = Definition(
    "additive_attention", Arguments, fake, reference, differentiable=("q", "k", "w", "value")
)
