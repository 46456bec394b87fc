"""The equation of :func:`attn_core.linear_attention`, with the N×M products in full, and its arguments."""

from typing import NamedTuple

import torch
from torch import Tensor

from attn_core.kernels.registration import Definition, token_major


class Arguments(NamedTuple):
    """As the public function's; log_decay (1, H), under vmap (B, H); a chunk_size of 0 is the backend's choice."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    initial_state: Tensor | None
    causal: bool
    scale: float
    normalize: bool
    eps: float
    chunk_size: int


def reference(a: Arguments) -> tuple[Tensor, Tensor]:
    """o_i = scale·Σ_j λ^|i−j| (q_i·k_j) v_j + scale·λ^{i+1} q_iᵀS_0;  S_M = λ^M S_0 + Σ_j λ^{M−1−j} k_j v_jᵀ."""
    q, k, v, log_decay, initial_state, causal, scale, normalize, eps, _ = a
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    Q, K, V = q.to(dtype), k.to(dtype), v.to(dtype)
    B, H, N, _ = q.shape
    M = k.shape[2]
    log = Q.new_zeros(1, H) if log_decay is None else log_decay.to(dtype)
    i, j = (torch.arange(n, dtype=dtype, device=q.device) for n in (N, M))
    weight = torch.exp(log[..., None, None] * (i[:, None] - j).abs())
    if causal:
        weight = weight.tril()
    s = scale * torch.einsum("bhid,bhjd->bhij", Q, K) * weight
    out = torch.einsum("bhij,bhjc->bhic", s, V)
    if normalize:
        out = out / (s.sum(-1, keepdim=True) + eps)
    state = torch.einsum("bhjd,bhjc->bhdc", K * torch.exp(log[..., None] * (M - 1 - j)).unsqueeze(-1), V)
    if initial_state is not None:
        S = initial_state.to(dtype)
        out = out + scale * torch.exp(log[..., None] * (i + 1)).unsqueeze(-1) * (Q @ S)
        state = state + torch.exp(log * M)[..., None, None] * S
    return out.to(q.dtype), state.expand(B, -1, -1, -1)


def fake(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Output, final state, and the denominators (without rows unless ``normalize``)."""
    q, value_width = a.q, a.v.shape[3]
    batch, heads, tokens, width = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return (
        token_major(q, batch, heads, tokens, value_width),
        q.new_empty(batch, heads, width, value_width, dtype=dtype),
        q.new_empty(batch, heads, tokens if a.normalize else 0, dtype=dtype),
    )


LINEAR_ATTENTION = Definition(
    "linear_attention",
    Arguments,
    fake,
    reference,
    differentiable=("q", "k", "v", "log_decay", "initial_state"),
    token_major_gradients=("q", "k", "v"),
    residuals=1,
)
