"""First-order recurrences with a hand-written gradient; kept for backward are the gates and the states."""

import math

import torch
from torch import Tensor

from attn_core.kernels.registration import register

from . import reference
from .recurrence import next_gates, scan


def forward(b: Tensor, a: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
    """b (B, T, P, F), a (B, T, P), h0 (B, P, F); memory: the states, in 16 bits once more in float32."""
    dtype = accumulation(b)
    start = None if h0 is None else h0.to(dtype)
    return scan(a.to(dtype).unsqueeze(-1), b.to(dtype), start, reverse).to(b.dtype)


def backward(
    grad: Tensor, h: Tensor, b: Tensor, a: Tensor, h0: Tensor | None, reverse: bool, needs: list[bool]
) -> list[Tensor]:
    """g_t = dh_t + a_{t+1} g_{t+1};  db = g;  da_t = Σ g_t h_{t−1};  dh0 = a_1 g_1."""
    dtype = accumulation(b)
    g = scan(next_gates(a.to(dtype).unsqueeze(-1), reverse), grad.to(dtype), None, not reverse)
    return gradients_of(g, h, b, a, h0, reverse, needs)


def gradients_of(
    g: Tensor, h: Tensor, b: Tensor, a: Tensor, h0: Tensor | None, reverse: bool, needs: list[bool]
) -> list[Tensor]:
    """Gradients of the arguments from those of the states."""
    dtype = g.dtype
    need_b, need_a, need_h0 = needs
    gates = a.to(dtype).unsqueeze(-1)
    steps = b.shape[1]
    first = steps - 1 if reverse else 0
    later, earlier = (slice(0, -1), slice(1, None)) if reverse else (slice(1, None), slice(0, -1))
    gradients = []
    if need_b:
        gradients.append(g.to(b.dtype))
    if need_a:
        da = torch.zeros(g.shape[:-1], dtype=dtype, device=a.device)
        if steps:
            da[:, later] = inner(g[:, later], h[:, earlier].to(dtype))
            if h0 is not None:
                da[:, first] = inner(g[:, first], h0.to(dtype))
        gradients.append(da.sum_to_size(a.shape).to(a.dtype))
    if need_h0:
        assert h0 is not None
        dh0 = gates[:, first] * g[:, first] if steps else torch.zeros_like(h0)
        gradients.append(dh0.to(h0.dtype))
    return gradients


def inner(x: Tensor, y: Tensor) -> Tensor:
    """Σ over the last dimension."""
    return (x * y).squeeze(-1) if x.shape[-1] == 1 else torch.einsum("...f,...f->...", x, y)


def accumulation(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def fake_forward(b: Tensor, a: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
    return b.new_empty(b.shape)


def canonical_reference(b: Tensor, a: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
    """The reference with the library operator's arguments."""
    return reference.linear_scan(a, b, h0, reverse=reverse)


_linear_scan = register(
    "linear_scan_torch",
    forward=forward,
    backward=backward,
    fake_forward=fake_forward,
    reference=canonical_reference,
    differentiable=("b", "a", "h0"),
)


def canonical(a: Tensor, b: Tensor, h0: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """b as (B, T, P, F), a as (B, T, P), h0 as (B, P, F): a is one number for each of P groups of F features."""
    shape = b.shape[2:]
    own = a.shape[2:]
    while own and own[-1] == 1:
        own = own[:-1]
    if own != shape[: len(own)]:  # ones before the end: a is repeated in memory
        own = shape[: len(own)]
        a = a.reshape(*a.shape[:2], *a.shape[2 : 2 + len(own)]).expand(*a.shape[:2], *own)
    groups, features = math.prod(own), math.prod(shape[len(own) :])
    batch, steps = b.shape[:2]
    flat = None if h0 is None else h0.reshape(batch, groups, features)
    return b.reshape(batch, steps, groups, features), a.reshape(a.shape[0], steps, groups), flat


def linear_scan(a: Tensor, b: Tensor, h0: Tensor | None = None, *, reverse: bool = False) -> Tensor:
    """See :func:`attn_core.linear_scan`."""
    if torch.compiler.is_exporting():
        return reference.linear_scan(a, b, h0, reverse=reverse)
    terms, gates, start = canonical(a, b, h0)
    return _linear_scan(terms, gates, start, reverse).view(b.shape)
