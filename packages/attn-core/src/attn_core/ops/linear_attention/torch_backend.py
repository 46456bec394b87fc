"""Chunked linear attention: products inside chunks, one D×Dv state between them.

One primitive, :func:`weighted_products`, gives the output and all three gradients, because with W_ij = λ^|i−j| ::

    O = (QKᵀ∘W)V      dQ = (dO Vᵀ∘W)K      dV = (KQᵀ∘Wᵀ)dO      dK = (V dOᵀ∘Wᵀ)Q

and the transpose of a causal W walks the sequence backwards. Only powers of λ with exponents ≥ 0 are formed. Where
there are more queries than keys, or fewer, one chunk ends with the shorter sequence: those behind it hold queries or
keys alone, and a state that starts or ends with the keys does so between two chunks.

Memory beyond the results: a chunk's scores and a few states D×Dv; the states of all chunks if ``log_decay`` has a
gradient; the normalized form holds its output once more in float32.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_core.kernels.registration import Grads, empty_gradient

from .normalization import normalized_gradient, with_ones
from .reference import LINEAR_ATTENTION, Arguments, fake, reference

CHUNK = 64
# Entries of an operand that are copied at a time where the order of tokens does not matter: 2²⁰ float32 are 4 MiB.
PIECE = 2**20


def forward(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """out, final state and denominator; within a chunk products of tokens, between chunks the state."""
    q, k, v, log_decay, initial_state, causal, scale, normalize, eps, chunk = a
    out, state, denominator = fake(a)
    chunk = chunk or CHUNK
    if causal and log_decay is None and not normalize and 0 < q.shape[2] <= chunk:
        return *_one_chunk(a, out, state), denominator
    values, raw = v, out
    if normalize:
        values = with_ones(v)
        raw = torch.empty(*out.shape[:-1], v.shape[-1] + 1, dtype=state.dtype, device=q.device)
    products = weighted_products(
        q, k, values, raw, log_decay, causal, chunk, start=initial_state, out_scale=scale, dtype=state.dtype
    )
    if normalize:
        torch.add(raw[..., -1], eps, out=denominator)
        torch.div(raw[..., :-1], denominator.unsqueeze(-1), out=raw[..., :-1])
        out.copy_(raw[..., :-1])
    return out, state.copy_(products.state[..., : v.shape[-1]]), denominator


def backward(grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:
    """The chunks again, from the end for k and v."""
    (grad_out, grad_state), (out, state, denominator) = grads, kept
    q, k, v, log_decay, initial_state, causal, scale, normalize, _, chunk = a
    assert grad_out is not None
    chunk = chunk or CHUNK
    need_q, need_k, need_v, need_decay, need_initial = needs
    dq, dk, dv = (empty_gradient(x, True) for x in (q, k, v))
    values, d_values = v, dv
    if normalize:
        grad_out, values = normalized_gradient(grad_out, out, denominator), with_ones(v)
        d_values = torch.empty_like(values)
        if grad_state is not None:
            grad_state = torch.nn.functional.pad(grad_state, (0, 1))
    rest = (log_decay, causal, chunk)
    first = None if initial_state is None else initial_state.transpose(-2, -1)
    last = None if grad_state is None else grad_state.transpose(-2, -1)
    dtype = state.dtype
    d_decay = d_initial = None
    by_query = by_key = None
    if need_q or need_decay:
        by_query = weighted_products(
            grad_out, values, k, dq, *rest,
            start=first, out_scale=scale, dtype=dtype, moment_of=q if need_decay else None,
        )  # fmt: skip
    if need_k or need_decay:
        by_key = weighted_products(
            values, grad_out, q, dk, *rest,
            transposed=True, start=last, in_scale=scale, dtype=dtype, moment_of=k if need_decay else None,
        )  # fmt: skip
    if need_v or need_initial:
        by_value = weighted_products(
            k, q, grad_out, d_values, *rest, transposed=True, start=grad_state, in_scale=scale, dtype=dtype
        )
        d_initial = by_value.state[..., : v.shape[-1]]
        if normalize:
            dv.copy_(d_values[..., :-1])
    if need_decay:
        assert by_query is not None
        assert by_key is not None
        assert log_decay is not None
        d_decay = decay_gradient(by_query, by_key, chunks(q.shape[2], k.shape[2], chunk))
    return [dq, dk, dv, d_decay, d_initial]


def _one_chunk(a: Arguments, out: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Causal products without decay where one chunk holds all tokens: no state comes in but the initial one."""
    whole = slice(None)
    q, k, v = (rows(x, whole, state.dtype) for x in (a.q, a.k, a.v))
    result = torch.bmm(torch.bmm(q, k.mT).tril_(), v)
    last = torch.bmm(k.mT, v)
    if a.initial_state is not None:
        start = a.initial_state.reshape(last.shape)
        result.baddbmm_(q, start)
        last += start
    if a.scale != 1.0:
        result.mul_(a.scale)
    return out.copy_(result.view(out.shape)), last.view(state.shape)


@dataclass
class Products:
    """What a run leaves beside its output.

    Attributes:
        state: behind the last chunk of the walk that has a start state, (B, H, D, Dv).
        moment: Σ ± t·x_t·out_t, t the position in the chunk from 1; + where the walk goes forwards. (B, H)
        ends: for each walk, states at the ends of the chunks, by chunk.
    """

    state: Tensor
    moment: Tensor
    ends: list[list[Tensor]]


def decay_gradient(by_query: Products, by_key: Products, parts: list[slice]) -> Tensor:
    """dlogλ (B, H), chunk by chunk.

    Count positions in a chunk from 1. λ's exponent in a term of the forward walk is the query's position less the
    key's, where a state that comes in is a key at 0 and the one that goes out is a query at the chunk's length; in the
    backward walk signs change. So dlogλ = Σ t·q_t·dq_t − Σ t·k_t·dk_t + length·⟨dS, S⟩: the exponents stay small, and
    no power of λ is divided by another.
    """
    total = by_query.moment + by_key.moment
    for first, second in zip(by_query.ends, by_key.ends, strict=True):
        for part, S, dS in zip(parts, first, second, strict=True):
            total = total + (part.stop - part.start) * (S * dS).sum((-2, -1)).view(total.shape)
    return total


# Whole: the two walks differ in a flag at each step and share all their state.
def weighted_products(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    out: Tensor,
    log_decay: Tensor | None,
    causal: bool,
    chunk: int,
    *,
    transposed: bool = False,
    start: Tensor | None = None,
    in_scale: float = 1.0,
    out_scale: float = 1.0,
    dtype: torch.dtype,
    moment_of: Tensor | None = None,
) -> Products:
    """Write ``out`` = out_scale·(abᵀ∘W)·(in_scale·c), or with Wᵀ, plus what the start state adds.

    a and out have one number of tokens, b and c another. The start state precedes the first token of a, or with
    ``transposed`` follows the last.
    """
    batch, heads, tokens, _ = a.shape
    others = b.shape[2]
    shape = (batch * heads, b.shape[-1], c.shape[-1])
    state = torch.zeros(shape, dtype=dtype, device=a.device)
    if start is not None:
        state.copy_(start.reshape(shape))
    moment = torch.zeros(batch, heads, dtype=dtype, device=a.device)
    ends: list[list[Tensor]] = []
    if log_decay is None and not causal:  # two products, in pieces only for the sake of memory
        size = max(chunk, PIECE // max(1, batch * heads * max(a.shape[-1], *shape[1:])))
        for part in chunks(others, others, size):
            state.baddbmm_(rows(b, part, dtype).transpose(1, 2), rows(c, part, dtype), alpha=in_scale)
        weighted = state if out_scale == 1.0 else state * out_scale
        for part in chunks(tokens, tokens, size):
            product = torch.bmm(rows(a, part, dtype), weighted)
            out[:, :, part] = product.view(batch, heads, part.stop - part.start, shape[-1])
        return Products(state.view(batch, heads, *shape[1:]), moment, ends)
    if start is not None and transposed and tokens < others:  # enters on the way, between two chunks
        entering, state = state, torch.zeros_like(state)
    else:
        entering = None
    parts = chunks(tokens, others, chunk)
    final = state if others else state.clone()
    # The walk that carries the start state first; without causality the opposite one adds the rest, less the diagonal.
    for reverse in (transposed,) if causal else (transposed, not transposed):
        second = reverse != transposed
        if second:
            state = torch.zeros_like(state)
        weights = (
            None
            if log_decay is None
            else Weights(log_decay.to(dtype), min(chunk, max(tokens, others, 1)), reverse, second)
        )
        collected: list[Tensor] = []
        for part in reversed(parts) if reverse else parts:
            if entering is not None and not second and part.stop == tokens:
                state = state + entering
            if moment_of is not None and reverse:
                collected.append(state.clone())
            A, B, C = (rows(x, part, dtype) for x in (a, b, c))
            if in_scale != 1.0:
                C = C * in_scale
            own, length = A.shape[1], part.stop - part.start
            scores = torch.bmm(A, B.transpose(1, 2))
            if weights is None:
                scores = scores.triu_() if reverse else scores.tril_()
            else:
                scores.view(batch, heads, own, B.shape[1]).mul_(weights.inside[..., :own, : B.shape[1]])
                A = weights.scaled(A, weights.arriving(length), batch)
                B = weights.scaled(B, weights.leaving(length), batch)
            result = torch.bmm(scores, C).baddbmm_(A, state)
            if weights is not None:
                state.view(batch, heads, *shape[1:]).mul_(weights.powers[..., length, None, None])
            state.baddbmm_(B.transpose(1, 2), C)
            if not second and not reverse and part.stop == others:
                final = state.clone() if others < tokens else state
            result = result.mul_(out_scale).view(batch, heads, own, shape[-1])
            if moment_of is not None:
                position = torch.arange(1, own + 1, dtype=dtype, device=a.device)
                dots = (result * moment_of[:, :, part]).sum(-1) @ position
                moment += -dots if reverse else dots
                if not reverse:
                    collected.append(state.clone())
            if second:
                out[:, :, part] += result
            else:
                out[:, :, part] = result
        ends.append(collected[::-1] if reverse else collected)
        if reverse and not second:
            final = state if entering is None or tokens else state + entering
    return Products(final.view(batch, heads, *shape[1:]), moment, ends)


class Weights:
    """Powers of λ for one walk: inside a chunk, from the state that arrives, and into the state that leaves."""

    def __init__(self, log_decay: Tensor, chunk: int, reverse: bool, strict: bool) -> None:
        i = torch.arange(chunk + 1, dtype=log_decay.dtype, device=log_decay.device)
        self.reverse = reverse
        self.powers = torch.exp(log_decay[..., None] * i)
        inside = torch.exp(log_decay[..., None, None] * (i[:-1, None] - i[:-1]).abs())
        self.inside = inside.triu(int(strict)) if reverse else inside.tril(-int(strict))

    def arriving(self, length: int) -> Tensor:
        """Decay of the state that comes into a chunk, for each of its tokens."""
        return self.powers[..., :length].flip(-1) if self.reverse else self.powers[..., 1 : length + 1]

    def leaving(self, length: int) -> Tensor:
        """Decay of each token's share in the state that leaves the chunk."""
        return self.powers[..., 1 : length + 1] if self.reverse else self.powers[..., :length].flip(-1)

    @staticmethod
    def scaled(x: Tensor, weight: Tensor, batch: int) -> Tensor:
        """Rows of x (B·H, n, D) times one weight for each head and token."""
        if x.shape[1] == 0:
            return x
        return (x.view(batch, weight.shape[-2], *x.shape[1:]) * weight.unsqueeze(-1)).view(x.shape)


def chunks(tokens: int, others: int, size: int) -> list[slice]:
    """Spans of both sequences: up to the end of the shorter, and what is left of the longer."""
    shared, longest = min(tokens, others), max(tokens, others)
    starts = [*range(0, shared, size), *range(shared, longest, size)]
    return [slice(start, stop) for start, stop in itertools.pairwise([*starts, longest])]


def rows(x: Tensor, part: slice, dtype: torch.dtype) -> Tensor:
    """A chunk of every head, contiguous in the accumulation dtype: (B·H, length, width)."""
    x = (x if part == slice(None) else x[:, :, part]).to(dtype)
    return x.reshape(x.shape[0] * x.shape[1], x.shape[2], x.shape[3])


linear_attention = LINEAR_ATTENTION.register("torch", forward, backward, exported=reference)
