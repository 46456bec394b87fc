"""The recurrence of :func:`attn_core.selective_scan`, step by step, and the arguments of all its backends."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core.kernels.registration import Definition


class Arguments(NamedTuple):
    """As the public function's; parameters A, D, delta_bias with a leading dimension (1, under vmap B).

    B and C (B, G, N, T), or (1, C, N, 1) if they are the same at every step.
    """

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

    @property
    def real(self) -> torch.dtype:
        """The dtype of sums: float64 for float64 operands, else float32."""
        return torch.float64 if self.u.dtype == torch.float64 else torch.float32

    @property
    def state(self) -> torch.dtype:
        """The dtype of states: complex if A is."""
        return self.real.to_complex() if self.A.is_complex() else self.real


def reference(x: Arguments) -> tuple[Tensor, Tensor]:
    """Δ = softplus(δ + bias);  h_t = exp(Δ_t A)∘h_{t−1} + Δ_t B_t u_t;  out_t = (C_t·h_t + D u_t)·silu(z_t).

    With complex A an entry stands for two that are conjugate: C_t·h_t is then twice its real part.
    """
    u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse = x
    dtype = x.real
    U, Δ = u.to(dtype), delta.to(dtype)
    batch, channels, steps = u.shape
    if delta_bias is not None:
        Δ = Δ + delta_bias.to(dtype).unsqueeze(-1)
    if delta_softplus:
        Δ = F.softplus(Δ)
    Bd, Cd = (m.to(x.state).repeat_interleave(channels // m.shape[1], 1).expand(-1, -1, -1, steps) for m in (B, C))
    h = Δ.new_zeros(batch, channels, A.shape[-1], dtype=x.state) if initial_state is None else initial_state.to(x.state)
    ys = [U[:, :, 0:0].sum(-1)] * steps
    for t in reversed(range(steps)) if reverse else range(steps):
        h = torch.exp(Δ[:, :, t, None] * A.to(x.state)) * h + (Δ * U)[:, :, t, None] * Bd[..., t]
        ys[t] = of_pairs((Cd[..., t] * h).sum(-1))
    out = torch.stack(ys, -1) if ys else torch.zeros_like(U)
    if D is not None:
        out = out + D.to(dtype).unsqueeze(-1) * U
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out.to(u.dtype), h.clone()


def of_pairs(y: Tensor) -> Tensor:
    """y, or y + ȳ if it is complex."""
    return 2 * y.real if y.is_complex() else y


def fake(x: Arguments, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state, and the states at the starts of chunks (B, chunks, C, N)."""
    u, dtype = x.u, x.state
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
