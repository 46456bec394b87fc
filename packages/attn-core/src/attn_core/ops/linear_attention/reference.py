"""The equation of :func:`attn_core.linear_attention`, with the N×M products in full."""

import torch
from torch import Tensor


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor | None = None,
    causal: bool = True,
    scale: float = 1.0,
    normalize: bool = False,
    eps: float = 0.0,
    initial_state: Tensor | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """o_i = scale·Σ_j λ^|i−j| (q_i·k_j) v_j + scale·λ^{i+1} q_iᵀS_0;  S_M = λ^M S_0 + Σ_j λ^{M−1−j} k_j v_jᵀ."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    Q, K, V = q.to(dtype), k.to(dtype), v.to(dtype)
    B, H, N, _ = q.shape
    M = k.shape[2]
    log = Q.new_zeros(1, H) if log_decay is None else log_decay.to(dtype).reshape(-1, H)
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
