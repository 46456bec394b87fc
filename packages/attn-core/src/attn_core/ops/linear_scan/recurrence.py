"""The recurrence h_t = a_t·h_{t−1} + b_t in few steps of Python: the primitive of both scans on the torch backend."""

import functools
import math

import torch
from torch import Tensor

# Steps over at least this many numbers spend their time in arithmetic; smaller ones in the calls, so that it pays to
# take the steps of many chunks at once.
WIDE_STEP = 2**13
# Up to so many steps, and entries of triangular systems, one solver call takes less time than the steps' calls.
FEW_STEPS, FEW_ENTRIES = 32, 2**14


def scan(a: Tensor, b: Tensor, start: Tensor | None, reverse: bool = False, out: Tensor | None = None) -> Tensor:
    """States (B, T, …) for gates ``a`` that broadcast to ``b``, all in the accumulation dtype.

    A narrow scan is cut in about √T chunks: all advance together from zero, beside the products of their gates; then
    the state that arrives at each chunk is found chunk by chunk and added, times those products. No division, and no
    logarithm: gates may be zero or negative.
    """
    steps = b.shape[1]
    if is_short(b, steps, a.numel()):
        states = solve(a, b, start, reverse)
        return states if out is None else out.copy_(states)
    h = torch.empty(b.shape, dtype=b.dtype, device=b.device) if out is None else out
    chunk = 1 << (math.isqrt(steps).bit_length() - 1) if steps else 1
    if chunk < 8 or h[:, :1].numel() >= WIDE_STEP:
        step_by_step(a, b, h, start, reverse)
        return h
    whole = steps // chunk * chunk
    # What does not fill a chunk is walked last.
    body, rest = (
        (slice(steps - whole, steps), slice(0, steps - whole)) if reverse else (slice(whole), slice(whole, steps))
    )
    split = (steps // chunk, chunk)
    gates, inputs, states = (x[:, body].unflatten(1, split) for x in (a, b, h))
    products = torch.empty(gates.shape, dtype=a.dtype, device=a.device)
    gate, term, state, product = (x.unbind(2) for x in (gates, inputs, states, products))
    order = range(chunk)[::-1] if reverse else range(chunk)
    before = order[0]
    state[before].copy_(term[before])
    product[before].copy_(gate[before])
    for t in order[1:]:
        torch.addcmul(term[t], gate[t], state[before], out=state[t])
        torch.mul(product[before], gate[t], out=product[t])
        before = t
    # States that arrive at each chunk; the first of the walk gets the start.
    arriving = torch.empty(state[before].shape, dtype=b.dtype, device=b.device)
    last = torch.empty_like(arriving)
    first = torch.zeros_like(arriving[:, 0]) if start is None else start.expand(arriving[:, 0].shape)
    step_by_step(product[before], state[before], last, first, reverse)
    if reverse:
        arriving[:, :-1], arriving[:, -1] = last[:, 1:], first
    else:
        arriving[:, 1:], arriving[:, 0] = last[:, :-1], first
    states.addcmul_(products, arriving.unsqueeze(2))
    step_by_step(a[:, rest], b[:, rest], h[:, rest], last[:, 0] if reverse else last[:, -1], reverse)
    return h


def is_short(like: Tensor, steps: int, gates: int) -> bool:
    """Whether :func:`solve` is the faster way."""
    return like.is_cpu and 0 < steps <= FEW_STEPS and 0 < gates * steps <= FEW_ENTRIES and like.numel() > 0


def solve(a: Tensor, b: Tensor, start: Tensor | None, reverse: bool) -> Tensor:
    """The states of a scan (B, T, …), gates and terms as they come."""
    own = a.shape[-1] == b.shape[-1] != 1  # a gate for each feature, each a system with one right-hand side
    if own:
        a, b = a.unsqueeze(-1), b.unsqueeze(-1)
        start = None if start is None else start.unsqueeze(-1)
    h = solve_last(a.movedim(1, -2), b.movedim(1, -2), start, reverse).movedim(-2, 1)
    return (h.squeeze(-1) if own else h).contiguous()


def solve_last(a: Tensor, b: Tensor, start: Tensor | None, reverse: bool) -> Tensor:
    """h − L h = b for gates a (…, T, 1) and terms b (…, T, F): L has the gates beside its diagonal.

    Forward substitution is the walk itself: what it adds beyond the recurrence are products with zeros.
    """
    if start is not None:
        first = -1 if reverse else 0
        b = b.clone()
        b[..., first, :].addcmul_(a[..., first, :], start)
    minus_one = _beside_diagonal(b.shape[-2], reverse, a.dtype)
    return torch.linalg.solve_triangular(a * minus_one, b, upper=reverse, unitriangular=True)


@functools.lru_cache(maxsize=2 * FEW_STEPS)
def _beside_diagonal(steps: int, reverse: bool, dtype: torch.dtype) -> Tensor:
    """(T, T): −1 where a step meets the one before it, else 0; on a CPU, whatever the default device is."""
    return torch.diag(torch.full((steps - 1,), -1.0, dtype=dtype, device="cpu"), 1 if reverse else -1)


def step_by_step(a: Tensor, b: Tensor, out: Tensor, start: Tensor | None, reverse: bool) -> None:
    """Write every state to ``out``, one step after another; fastest for few steps."""
    gates, terms, states = a.unbind(1), b.unbind(1), out.unbind(1)
    order = range(len(terms))[::-1] if reverse else range(len(terms))
    for t in order:
        if start is None:
            states[t].copy_(terms[t])
        else:
            torch.addcmul(terms[t], gates[t], start, out=states[t])
        start = states[t]


def next_gates(a: Tensor, reverse: bool = False) -> Tensor:
    """a_{t+1} at t, the gates of the scan that runs against this one; the last is never used."""
    return a.roll(1 if reverse else -1, 1)
