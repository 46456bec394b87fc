"""The recurrence of :func:`attn_core.linear_scan`, step by step, and the arguments of all its backends."""

from typing import NamedTuple

import torch
from torch import Tensor

from attn_core.kernels.registration import Definition


class Arguments(NamedTuple):
    """b (B, T, P, F), a (B|1, T, P), h0 (B, P, F): one gate for each of P groups of F features."""

    b: Tensor
    a: Tensor
    h0: Tensor | None
    reverse: bool


def reference(x: Arguments) -> Tensor:
    """h_t = a_t·h_{t−1} + b_t, or with ``reverse`` h_t = a_t·h_{t+1} + b_t."""
    b, a = x.b.to(accumulation(x.b)), x.a.to(accumulation(x.b)).unsqueeze(-1)
    h = b.new_zeros(b.shape[:1] + b.shape[2:]) if x.h0 is None else x.h0.to(b.dtype)
    steps: list[Tensor] = [h] * b.shape[1]
    for t in reversed(range(b.shape[1])) if x.reverse else range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        steps[t] = h
    return torch.stack(steps, 1).to(x.b.dtype) if steps else torch.zeros_like(x.b)


def fake(x: Arguments) -> Tensor:
    """Uninitialized states, of the terms' shape."""
    return x.b.new_empty(x.b.shape)


def accumulation(x: Tensor) -> torch.dtype:
    """The dtype in which states are summed: float64 for float64, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


LINEAR_SCAN = Definition("linear_scan", Arguments, fake, reference, differentiable=("b", "a", "h0"))
