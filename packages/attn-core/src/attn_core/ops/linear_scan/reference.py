"""The recurrence of :func:`attn_core.linear_scan`, step by step."""

import torch
from torch import Tensor


def linear_scan(a: Tensor, b: Tensor, h0: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """h_t = a_t·h_{t−1} + b_t, or with ``reverse`` h_t = a_t·h_{t+1} + b_t."""
    dtype = torch.float64 if b.dtype == torch.float64 else torch.float32
    a = a.to(dtype).reshape(*a.shape, *[1] * (b.ndim - a.ndim))
    h = b.new_zeros(b.shape[:1] + b.shape[2:], dtype=dtype) if h0 is None else h0.to(dtype)
    steps: list[Tensor] = [h] * b.shape[1]
    for t in reversed(range(b.shape[1])) if reverse else range(b.shape[1]):
        h = a[:, t] * h + b[:, t].to(dtype)
        steps[t] = h
    return torch.stack(steps, 1).to(b.dtype) if steps else torch.zeros_like(b)
