"""Selective scan in chunks of steps: states of one chunk at a time, those at chunk starts kept for backward.

Memory beyond the results: T/CHUNK states (B, C, N), and about eight arrays of states for CHUNK steps of a few images.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core.kernels.registration import Grads
from attn_core.ops.linear_scan.recurrence import is_short, next_gates, scan, solve_last

from .reference import Arguments, accumulation, definition, fake, reference

CHUNK = 64
# Numbers in one array of a chunk: images are taken together until they fill it.
CHUNK_NUMBERS = 2**20


def forward(x: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state, and the states at the starts of the chunks (B, chunks, C, N)."""
    if is_short(x.u, x.u.shape[2], x.u.numel() * x.A.shape[2]):
        return _short_forward(x)
    out, state, starts = fake(x, CHUNK)
    for images in spans(*state.shape):
        inputs = Span(images, x)
        h = start_of(x.initial_state, images, state)
        for chunk, steps in inputs.walk():
            starts[images, chunk] = h
            part = Part(inputs, steps, h)
            h = part.last
            y = part.read()
            if part.z is not None:
                y *= F.silu(part.z)
            out[images, :, steps] = y.transpose(1, 2)
        state[images] = h
    return out, state, starts


def _short_forward(x: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The same for few steps, one chunk, in few calls: everything (B, C, N, T)."""
    dtype = accumulation(x.u)
    u, delta, A, B, C = (t if t.dtype == dtype else t.to(dtype) for t in x[:5])
    if x.delta_bias is not None:
        delta = delta + x.delta_bias.unsqueeze(-1)
    if x.delta_softplus:
        delta = F.softplus(delta)
    if B.shape[1] > 1:
        B, C = (t.repeat_interleave(u.shape[1] // t.shape[1], 1) for t in (B, C))
    start = x.initial_state
    a = torch.mul(delta.unsqueeze(2), A.unsqueeze(-1)).exp_()
    h = (delta * u).unsqueeze(2) * B
    h = solve_last(a.unsqueeze(-1), h.unsqueeze(-1), None if start is None else start.unsqueeze(-1), x.reverse)
    h = h.squeeze(-1)
    last = h.select(-1, 0 if x.reverse else -1).clone(memory_format=torch.contiguous_format)
    y = h.mul_(C).sum(2)
    if x.D is not None:
        y = torch.addcmul(y, u, x.D.unsqueeze(-1))
    if x.z is not None:
        y = y * F.silu(x.z.to(dtype))
    starts = torch.zeros_like(last) if start is None else start.clone(memory_format=torch.contiguous_format)
    return y.to(x.u.dtype, memory_format=torch.contiguous_format), last, starts.unsqueeze(1)


def backward(grads: Grads, kept: tuple[Tensor, ...], x: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:  # noqa: ARG001  the backends' signature
    """Chunk by chunk against the walk: recompute the states h, then scan their gradient g.

    g_t = C_t dy_t + a_{t+1} g_{t+1} with a = exp(ΔA). w_t = a_t g_t h_{t−1} is the gradient of log a_t = Δ_t A; so
    dA = Σ w Δ;  dΔ = Σ_N w A + u (g·B);  du = Δ (g·B) + D dy;  dB = Σ_C g Δ u;  dC = Σ_C dy h.
    """
    (grad_out, grad_state), (starts,) = grads, kept
    assert grad_out is not None
    u, delta, A, B, C, _, z = x[:7]
    dtype = starts.dtype
    du, d_delta, dB, dC = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, delta, B, C))
    dz = None if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    batch, channels, _ = u.shape
    shape = (batch, channels, A.shape[-1])
    dA, d_initial = (torch.zeros(shape, dtype=dtype, device=u.device) for _ in range(2))
    dD, d_bias = (torch.zeros(shape[:2], dtype=dtype, device=u.device) for _ in range(2))
    for images in spans(*shape):
        inputs = Span(images, x)
        arriving = start_of(grad_state, images, d_initial)
        for chunk, steps in reversed(inputs.walk()):
            part = Part(inputs, steps, starts[images, chunk])
            dy = inputs.rows(grad_out, steps)
            if part.z is not None:
                assert dz is not None
                gate = torch.sigmoid(part.z)
                slope = gate * (1 + part.z * (1 - gate))
                dz[images, :, steps] = (dy * part.read() * slope).transpose(1, 2)
                dy = dy * (part.z * gate)
            groups, per_group = part.B.shape[2], channels // part.B.shape[2]
            split = (groups, per_group)
            by_group = dy.unflatten(2, split).unsqueeze(-1)
            dC[images, :, :, steps] = (part.h.unflatten(2, split) * by_group).sum(3).permute(0, 2, 3, 1)
            g = (by_group * part.C.unsqueeze(3)).flatten(2, 3)
            g[:, part.final] += arriving
            g = scan(next_gates(part.a, x.reverse), g, None, not x.reverse)
            grouped = g.unflatten(2, split)
            arriving = part.a[:, part.first] * g[:, part.first]
            read = torch.matmul(grouped, part.B.unsqueeze(-1)).squeeze(-1).flatten(2, 3)
            dB[images, :, :, steps] = (
                torch.matmul((part.delta * part.u).unflatten(2, split).unsqueeze(3), grouped)
                .squeeze(3)
                .permute(0, 2, 3, 1)
            )
            w = g.mul_(part.before).mul_(part.a)
            dA[images] += torch.einsum("btcn,btc->bcn", w, part.delta)
            d_part = torch.einsum("btcn,bcn->btc", w, inputs.A.expand(w.shape[0], -1, -1)) + part.u * read
            d_u = part.delta * read
            if inputs.D is not None:
                dD[images] += (dy * part.u).sum(1)
                d_u = d_u + dy * inputs.D.unsqueeze(1)
            if x.delta_softplus:
                d_part = d_part * -torch.expm1(-part.delta)  # sigmoid of what softplus was taken of
            d_bias[images] += d_part.sum(1)
            du[images, :, steps] = d_u.transpose(1, 2)
            d_delta[images, :, steps] = d_part.transpose(1, 2)
        d_initial[images] = arriving
    return [du, d_delta, dA, dB, dC, dD, dz, d_bias, d_initial]


def spans(batch: int, channels: int, width: int) -> list[slice]:
    """Images that are walked together."""
    size = max(1, CHUNK_NUMBERS // max(1, CHUNK * channels * width))
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


def start_of(given: Tensor | None, images: slice, like: Tensor) -> Tensor:
    """The given initial state of these images, or zeros like ``like``."""
    return torch.zeros_like(like[images]) if given is None else given[images].to(like.dtype)


class Span:
    """Arguments of a few images."""

    def __init__(self, images: slice, x: Arguments) -> None:
        self.dtype = accumulation(x.u)
        self.images, self.reverse, self.delta_softplus = images, x.reverse, x.delta_softplus
        self.u, self.delta, self.B, self.C, self.z = x.u, x.delta, x.B, x.C, x.z
        # Parameters have a batch of 1, under vmap one value for each image.
        self.A = self.parameter(x.A)
        self.D, self.bias = (None if t is None else self.parameter(t) for t in (x.D, x.delta_bias))

    def parameter(self, x: Tensor) -> Tensor:
        """The part of x that belongs to these images, in the accumulation dtype."""
        return (x if x.shape[0] == 1 else x[self.images]).to(self.dtype)

    def walk(self) -> list[tuple[int, slice]]:
        """Chunks in the order of the recurrence."""
        steps = self.u.shape[2]
        parts = [slice(start, min(start + CHUNK, steps)) for start in range(0, steps, CHUNK)]
        return list(enumerate(parts))[::-1] if self.reverse else list(enumerate(parts))

    def rows(self, x: Tensor, steps: slice) -> Tensor:
        """(images, steps, …) of a tensor whose last dimension is the sequence."""
        return x[self.images, ..., steps].to(self.dtype).movedim(-1, 1).contiguous()


class Part:
    """One chunk of steps: gates a, states h and the states before them, all (images, steps, C, N)."""

    def __init__(self, inputs: Span, steps: slice, start: Tensor) -> None:
        self.inputs = inputs
        self.u, self.delta, self.B, self.C = (
            inputs.rows(x, steps) for x in (inputs.u, inputs.delta, inputs.B, inputs.C)
        )
        self.z = None if inputs.z is None else inputs.rows(inputs.z, steps)
        if inputs.bias is not None:
            self.delta = self.delta + inputs.bias.unsqueeze(1)
        if inputs.delta_softplus:
            self.delta = F.softplus(self.delta)
        images, length, channels = self.u.shape
        groups, width = self.B.shape[2:]
        self.a = (self.delta.unsqueeze(-1) * inputs.A.unsqueeze(1)).exp_()
        terms = (self.delta * self.u).view(images, length, groups, channels // groups, 1) * self.B.unsqueeze(3)
        states = torch.empty(images, length + 1, channels, width, dtype=inputs.dtype, device=start.device)
        self.first, self.final = (length - 1, 0) if inputs.reverse else (0, length - 1)
        if inputs.reverse:
            self.h, self.before = states[:, :-1], states[:, 1:]
        else:
            self.h, self.before = states[:, 1:], states[:, :-1]
        self.before[:, self.first] = start
        scan(self.a, terms.view(self.a.shape), start, inputs.reverse, out=self.h)
        self.last = self.h[:, self.final].clone()

    def read(self) -> Tensor:
        """y = C·h + D u, (images, steps, C)."""
        images, length, channels, _ = self.h.shape
        grouped = self.h.unflatten(2, (self.C.shape[2], channels // self.C.shape[2]))
        y = torch.matmul(grouped, self.C.unsqueeze(-1)).view(images, length, channels)
        return y if self.inputs.D is None else y + self.inputs.D.unsqueeze(1) * self.u


selective_scan = definition(CHUNK).register("torch", forward, backward, exported=reference)
