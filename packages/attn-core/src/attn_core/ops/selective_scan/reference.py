"""The recurrence of :func:`attn_core.selective_scan`, step by step, and the arguments of all its backends."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core.kernels.registration import Definition


class Arguments(NamedTuple):
    """As the public function's; parameters A, D, delta_bias with a leading dimension (1, under vmap B)."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None
    delta_softplus: bool
    reverse: bool


def reference(x: Arguments) -> tuple[Tensor, Tensor]:
    """Δ = softplus(δ + bias);  h_t = exp(Δ_t A)∘h_{t−1} + Δ_t B_t u_t;  out_t = (C_t·h_t + D u_t)·silu(z_t)."""
    u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse = x
    dtype = accumulation(u)
    U, Δ = u.to(dtype), delta.to(dtype)
    batch, channels, steps = u.shape
    if delta_bias is not None:
        Δ = Δ + delta_bias.to(dtype).unsqueeze(-1)
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
        out = out + D.to(dtype).unsqueeze(-1) * U
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out.to(u.dtype), h.clone()


def accumulation(u: Tensor) -> torch.dtype:
    """The dtype in which states are summed: float64 for float64, else float32."""
    return torch.float64 if u.dtype == torch.float64 else torch.float32


def fake(x: Arguments, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state, and the states at the starts of chunks (B, chunks, C, N)."""
    u, dtype = x.u, accumulation(x.u)
    batch, channels, steps = u.shape
    state = u.new_empty(batch, channels, x.A.shape[-1], dtype=dtype)
    return u.new_empty(u.shape), state, u.new_empty(batch, (steps + chunk - 1) // chunk, *state.shape[1:], dtype=dtype)


def definition(chunk: int) -> Definition[Arguments]:
    """Of the backend that keeps a state of every ``chunk`` steps."""
    return Definition(
        "selective_scan",
        Arguments,
        lambda x: fake(x, chunk),
        reference,
        differentiable=("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"),
        residuals=1,
        keeps_outputs=False,
    )
