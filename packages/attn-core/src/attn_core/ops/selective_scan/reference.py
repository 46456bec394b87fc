"""The recurrence of :func:`attn_core.selective_scan`, step by step."""

import torch
import torch.nn.functional as F
from torch import Tensor


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Δ = softplus(δ + bias);  h_t = exp(Δ_t A)∘h_{t−1} + Δ_t B_t u_t;  out_t = (C_t·h_t + D u_t)·silu(z_t)."""
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    U, Δ = u.to(dtype), delta.to(dtype)
    batch, channels, steps = u.shape
    if delta_bias is not None:
        Δ = Δ + delta_bias.to(dtype).reshape(-1, channels, 1)
    if delta_softplus:
        Δ = F.softplus(Δ)
    per_group = channels // B.shape[1]
    Bd, Cd = (x.to(dtype).repeat_interleave(per_group, dim=1) for x in (B, C))
    h = Δ.new_zeros(batch, channels, A.shape[-1]) if initial_state is None else initial_state.to(dtype)
    ys = [U[:, :, 0:0].sum(-1)] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        h = torch.exp(Δ[:, :, t, None] * A.to(dtype)) * h + (Δ * U)[:, :, t, None] * Bd[..., t]
        ys[t] = (Cd[..., t] * h).sum(-1)
    out = torch.stack(ys, -1) if ys else torch.zeros_like(U)
    if D is not None:
        out = out + D.to(dtype).reshape(-1, channels, 1) * U
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out.to(u.dtype), h.clone()
