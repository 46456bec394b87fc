"""First-order recurrences with a hand-written gradient; kept for backward are the gates and the states."""

from collections.abc import Sequence

import torch
from torch import Tensor

from attn_core.kernels.registration import Grads

from .recurrence import next_gates, scan
from .reference import LINEAR_SCAN, Arguments, accumulation, reference


def forward(x: Arguments) -> Tensor:
    """Memory: the states, in 16 bits once more in float32."""
    dtype = accumulation(x.b)
    a, b, start = (t if t is None or t.dtype == dtype else t.to(dtype) for t in (x.a, x.b, x.h0))
    assert a is not None
    assert b is not None
    states = scan(a.unsqueeze(-1), b, start, x.reverse)
    return states if dtype == x.b.dtype else states.to(x.b.dtype)


def backward(grads: Grads, kept: tuple[Tensor, ...], x: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:
    """g_t = dh_t + a_{t+1} g_{t+1};  db = g;  da_t = Σ g_t h_{t−1};  dh0 = a_1 g_1."""
    (grad,), (h,) = grads, kept
    assert grad is not None
    dtype = accumulation(x.b)
    g = scan(next_gates(x.a.to(dtype).unsqueeze(-1), x.reverse), grad.to(dtype), None, not x.reverse)
    return gradients_of(g, h, x, needs)


def gradients_of(g: Tensor, h: Tensor, x: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:
    """Gradients of the arguments from those of the states."""
    _, need_a, need_h0 = needs
    steps = g.shape[1]
    first = steps - 1 if x.reverse else 0
    later, earlier = (slice(0, -1), slice(1, None)) if x.reverse else (slice(1, None), slice(0, -1))
    da = dh0 = None
    if need_a:
        da = torch.zeros(g.shape[:-1], dtype=g.dtype, device=g.device)
        if steps:
            da[:, later] = inner(g[:, later], h[:, earlier].to(g.dtype))
            if x.h0 is not None:
                da[:, first] = inner(g[:, first], x.h0.to(g.dtype))
    if need_h0 and x.h0 is not None:
        dh0 = x.a[:, first, :, None].to(g.dtype) * g[:, first] if steps else torch.zeros_like(x.h0)
    return [g, da, dh0]


def inner(x: Tensor, y: Tensor) -> Tensor:
    """Σ over the last dimension."""
    return (x * y).squeeze(-1) if x.shape[-1] == 1 else torch.einsum("...f,...f->...", x, y)


linear_scan = LINEAR_SCAN.register("torch", forward, backward, exported=reference)
