"""Selective scan in chunks of steps: states of one chunk at a time, those at chunk starts kept for backward.

Memory beyond the results: T/CHUNK states (B, C, N), and about eight arrays of states for CHUNK steps of a few images.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core.kernels.registration import Grads
from attn_core.ops.linear_scan.recurrence import is_short, next_gates, scan, solve_last

from .reference import Arguments, definition, fake, of_pairs, reference

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
    dtype, state = x.real, x.state
    u, delta = (t if t.dtype == dtype else t.to(dtype) for t in x[:2])
    A, B, C = (t if t.dtype == state else t.to(state) for t in x[2:5])
    if x.delta_bias is not None:
        delta = delta + x.delta_bias.unsqueeze(-1)
    if x.delta_softplus:
        delta = F.softplus(delta)
    B, C = (m.repeat_interleave(u.shape[1] // m.shape[1], 1) if 1 < m.shape[1] < u.shape[1] else m for m in (B, C))
    start = x.initial_state
    a = torch.mul(delta.unsqueeze(2), A.unsqueeze(-1)).exp_()
    h = (delta * u).unsqueeze(2) * B
    h = solve_last(a.unsqueeze(-1), h.unsqueeze(-1), None if start is None else start.unsqueeze(-1), x.reverse)
    h = h.squeeze(-1)
    last = h.select(-1, 0 if x.reverse else -1).clone(memory_format=torch.contiguous_format)
    y = of_pairs(h.mul_(C).sum(2))
    if x.D is not None:
        y = torch.addcmul(y, u, x.D.unsqueeze(-1))
    if x.z is not None:
        y = y * F.silu(x.z.to(dtype))
    starts = torch.zeros_like(last) if start is None else start.clone(memory_format=torch.contiguous_format)
    return y.to(x.u.dtype, memory_format=torch.contiguous_format), last, starts.unsqueeze(1)


def backward(grads: Grads, kept: tuple[Tensor, ...], x: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:  # noqa: ARG001  the backends' signature
    """Chunk by chunk against the walk: recompute the states h, then scan their gradient g.

    g_t = C_t dy_t + a_{t+1} g_{t+1} with a = exp(ΔA). w_t = a_t g_t h_{t−1} is the gradient of log a_t = Δ_t A; so
    dA = Σ w Δ;  dΔ = Σ_N w A + u (g·B);  du = Δ (g·B) + D dy;  dB = Σ_C g Δ u;  dC = Σ_C dy h. If A is complex, what
    stands beside g or dy is conjugate, dy counts twice, and sums that belong to real operands are real parts.
    """
    (grad_out, grad_state), (starts,) = grads, kept
    assert grad_out is not None
    u, delta, A, _, _, _, z = x[:7]
    du, d_delta = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, delta))
    dB, dC = MapGradient(x, x.B), MapGradient(x, x.C)
    dz = None if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    batch, channels, _ = u.shape
    shape = (batch, channels, A.shape[-1])
    dA, d_initial = (torch.zeros(shape, dtype=x.state, device=u.device) for _ in range(2))
    dD, d_bias = (torch.zeros(shape[:2], dtype=x.real, device=u.device) for _ in range(2))
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
            by_group = (2 * dy if x.A.is_complex() else dy).unflatten(2, part.split(part.C)).unsqueeze(-1)
            dC.put(images, steps, (part.h.conj().unflatten(2, part.split(part.C)) * by_group).sum(3))
            g = (by_group * part.C.conj().unsqueeze(3)).flatten(2, 3)
            g[:, part.final] += arriving
            a = part.a.conj_physical()
            g = scan(next_gates(a, x.reverse), g, None, not x.reverse)
            grouped = g.unflatten(2, part.split(part.B))
            arriving = a[:, part.first] * g[:, part.first]
            read = torch.matmul(grouped, part.B.conj().unsqueeze(-1)).squeeze(-1).flatten(2, 3)
            taken = (part.delta * part.u).unflatten(2, part.split(part.B)).unsqueeze(3).to(g.dtype)
            dB.put(images, steps, torch.matmul(taken, grouped).squeeze(3))
            read = read.real if read.is_complex() else read
            w = g.mul_(part.before.conj()).mul_(a)
            dA[images] += torch.einsum("btcn,btc->bcn", w, part.delta.to(w.dtype))
            d_part = torch.einsum("btcn,bcn->btc", w, inputs.A.conj().expand(w.shape[0], -1, -1))
            d_part = (d_part.real if d_part.is_complex() else d_part) + part.u * read
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
    return [du, d_delta, dA, dB.total, dC.total, dD, dz, d_bias, d_initial]


class MapGradient:
    """The gradient of B or C (B, G, N, T), or of what is the same at every step (B, C, N, 1)."""

    def __init__(self, x: Arguments, given: Tensor) -> None:
        batch, _, steps = x.u.shape
        self.constant = given.shape[-1] != steps
        shape = (batch, *given.shape[1:])
        if self.constant:
            self.total = torch.zeros(shape, dtype=x.state, device=given.device)
        else:
            self.total = torch.empty(shape, dtype=given.dtype, device=given.device)

    def put(self, images: slice, steps: slice, gradient: Tensor) -> None:
        """Take that of some steps, (images, steps, G, N)."""
        if self.constant:
            self.total[images, ..., 0] += gradient.sum(1)
        else:
            self.total[images, ..., steps] = gradient.permute(0, 2, 3, 1)


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
        self.dtype, self.state = x.real, x.state
        self.images, self.reverse, self.delta_softplus = images, x.reverse, x.delta_softplus
        self.u, self.delta, self.B, self.C, self.z = x.u, x.delta, x.B, x.C, x.z
        # Parameters have a batch of 1, under vmap one value for each image.
        self.A = self.own(x.A).to(self.state)
        self.D, self.bias = (None if t is None else self.own(t).to(self.dtype) for t in (x.D, x.delta_bias))

    def own(self, x: Tensor) -> Tensor:
        """The part of x that belongs to these images."""
        return x if x.shape[0] == 1 else x[self.images]

    def maps(self, x: Tensor, steps: slice) -> Tensor:
        """B or C as (images|1, steps|1, G, N)."""
        x = self.own(x) if x.shape[-1] != self.u.shape[2] else self.own(x)[..., steps]
        return x.to(self.state).movedim(-1, 1).contiguous()

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
        self.u, self.delta = (inputs.rows(x, steps) for x in (inputs.u, inputs.delta))
        self.B, self.C = (inputs.maps(x, steps) for x in (inputs.B, inputs.C))
        self.z = None if inputs.z is None else inputs.rows(inputs.z, steps)
        if inputs.bias is not None:
            self.delta = self.delta + inputs.bias.unsqueeze(1)
        if inputs.delta_softplus:
            self.delta = F.softplus(self.delta)
        images, length, channels = self.u.shape
        width = self.B.shape[3]
        self.a = (self.delta.unsqueeze(-1) * inputs.A.unsqueeze(1)).exp_()
        terms = (self.delta * self.u).view(images, length, *self.split(self.B), 1) * self.B.unsqueeze(3)
        states = torch.empty(images, length + 1, channels, width, dtype=inputs.state, device=start.device)
        self.first, self.final = (length - 1, 0) if inputs.reverse else (0, length - 1)
        if inputs.reverse:
            self.h, self.before = states[:, :-1], states[:, 1:]
        else:
            self.h, self.before = states[:, 1:], states[:, :-1]
        self.before[:, self.first] = start
        scan(self.a, terms.view(self.a.shape), start, inputs.reverse, out=self.h)
        self.last = self.h[:, self.final].clone()

    def split(self, x: Tensor) -> tuple[int, int]:
        """Groups of B or C, and the channels of each."""
        groups, channels = x.shape[2], self.u.shape[2]
        return groups, channels // groups

    def read(self) -> Tensor:
        """y = C·h + D u, (images, steps, C)."""
        grouped = self.h.unflatten(2, self.split(self.C))
        y = of_pairs(torch.matmul(grouped, self.C.unsqueeze(-1)).view(self.h.shape[:3]))
        return y if self.inputs.D is None else y + self.inputs.D.unsqueeze(1) * self.u


selective_scan = definition(CHUNK).register("torch", forward, backward, exported=reference)
