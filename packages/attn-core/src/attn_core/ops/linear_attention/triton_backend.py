"""Linear attention on a GPU: which runs of the two kernels give output and gradients.

This file imports without Triton. Memory beyond the results: the states of all chunks, N/chunk·D·Dv float32 for each
walk; the normalized form also its output in float32. The gradient of ``log_decay`` is that of the torch backend.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_core.kernels.launch import Tile, architecture, launch, power_of_two, product_options, unit_stride
from attn_core.kernels.registration import Grads, empty_gradient

from . import torch_backend
from .normalization import normalized_gradient, with_ones
from .reference import LINEAR_ATTENTION, Arguments, fake


def forward(a: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Chunks side by side, then a scan over the states between them."""
    q, k, v, log_decay, initial_state, causal, scale, normalize, eps, chunk_size = a
    if q.numel() == 0 or v.numel() == 0:
        return torch_backend.forward(a)
    out, state, denominator = fake(a)
    values, raw, final = v, out, state
    if normalize:
        values = with_ones(v)
        raw, final = (x.new_empty(*x.shape[:-1], x.shape[-1] + 1, dtype=torch.float32) for x in (out, state))
    run = _Run(q, k, log_decay, chunk_size)
    states = run.states(k, values, initial_state, final, 1.0, reverse=False)
    others = None if causal else run.states(k, values, None, torch.empty_like(final), 1.0, reverse=True)
    run.output(q, k, values, states, others, raw, scale, scale)
    if normalize:
        torch.add(raw[..., -1], eps, out=denominator)
        out.copy_(raw[..., :-1] / denominator.unsqueeze(-1))
        state.copy_(final[..., :-1])
    return out, state, denominator


def backward(grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:
    """The chunks again from their states; the states' gradients by a scan from the end."""
    (grad_out, grad_state), (out, _, denominator) = grads, kept
    q, k, v, log_decay, initial_state, causal, scale, normalize, _, chunk_size = a
    assert grad_out is not None
    if q.numel() == 0 or v.numel() == 0:
        return torch_backend.backward(grads, kept, a, needs)
    need_q, need_k, need_v, need_decay, need_initial = needs
    dq, dk, dv = (empty_gradient(x, True) for x in (q, k, v))
    d_decay = d_initial = None
    if need_decay:
        d_decay = torch_backend.backward(grads, kept, a, (False, False, False, True, False))[3]
    values, d_values = v, dv
    if normalize:
        if q.dtype == torch.float16:  # dO divided by sums over all keys is too small for it
            q, k, v = q.float(), k.float(), v.float()
        grad_out = normalized_gradient(grad_out, out, denominator).to(q.dtype)
        values = with_ones(v)
        d_values = torch.empty_like(values)
        grad_state = None if grad_state is None else torch.nn.functional.pad(grad_state, (0, 1))
    run = _Run(q, k, log_decay, chunk_size)
    # Behind the last of fewer keys than queries the walk is inside a chunk: what the state asks for joins afterwards.
    late = None
    if grad_state is not None and k.shape[2] < q.shape[2]:
        late = _state_gradients(k, values, log_decay, grad_state)
    if need_q:
        memory = _state_like(k, values)
        states = run.states(k, values, initial_state, memory, 1.0, reverse=False)
        others = None if causal else run.states(k, values, None, memory, 1.0, reverse=True)
        run.output(grad_out, values, k, states, others, dq, scale, scale, transposed=True)
    if need_k or need_v or need_initial:
        d_initial, memory = _state_like(q, grad_out), _state_like(q, grad_out)
        behind = grad_state if late is None else None
        states = run.states(q, grad_out, behind, d_initial, scale, reverse=True)
        others = None if causal else run.states(q, grad_out, None, memory, scale, reverse=False)
        if need_v:
            run.output(k, q, grad_out, others, states, d_values, scale, 1.0)
        if need_k:
            run.output(values, grad_out, q, others, states, dk, scale, 1.0, transposed=True)
        if late is not None:
            for target, piece in zip((dk, d_values, d_initial), late, strict=True):
                target += piece
        if normalize:
            dv.copy_(d_values[..., :-1])
            d_initial = d_initial[..., :-1]
    return [dq, dk, dv, d_decay, d_initial]


def _state_gradients(
    k: Tensor, v: Tensor, log_decay: Tensor | None, grad_state: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of keys, values and initial state through the final state alone."""
    keys = k.shape[2]
    log = grad_state.new_zeros(1, k.shape[1]) if log_decay is None else log_decay
    left = torch.arange(keys - 1, -1, -1, device=k.device, dtype=log.dtype)
    weight = torch.exp(log[..., None] * left).unsqueeze(-1)
    d_k = (v.float() * weight) @ grad_state.transpose(-2, -1)
    return d_k, (k.float() * weight) @ grad_state, torch.exp(log * keys)[..., None, None] * grad_state


def _state_like(b: Tensor, c: Tensor) -> Tensor:
    return b.new_empty(*b.shape[:2], b.shape[3], c.shape[3], dtype=torch.float32)


class _Run:
    """Launches of the two kernels for one problem."""

    def __init__(self, q: Tensor, k: Tensor, log_decay: Tensor | None, chunk_size: int) -> None:
        self.log, self.dtype, self.device = log_decay, q.dtype, q.device
        self.batch, self.heads, queries, _ = q.shape
        self.tokens = max(queries, k.shape[2])
        arch = architecture(q.device)
        # Without tensor cores a product of wider tiles is unrolled into more registers than there are.
        size = 16 if arch == "interpreter" else 32 if q.dtype == torch.float32 else 64
        self.chunk = min(size, power_of_two(chunk_size + 1, 32) // 2) if chunk_size else size
        self.size = size
        self.chunks = math.ceil(self.tokens / self.chunk)

    def options(self) -> dict[str, Any]:
        return {"BM": self.chunk, **product_options(self.dtype)}

    def columns(self, width: int) -> int:
        return min(self.size, power_of_two(width, 16))

    def log_stride(self) -> int:
        return 0 if self.log is None or self.log.shape[0] == 1 else self.log.stride(0)

    def states(
        self, b: Tensor, c: Tensor, start: Tensor | None, final: Tensor, scale: float, *, reverse: bool
    ) -> Tensor:
        """States that arrive at each chunk, (B, H, chunks, D, Dv); the one that leaves the last goes to ``final``."""
        b, c = unit_stride(b), unit_stride(c)
        width, value_width = b.shape[3], c.shape[3]
        states = torch.empty(
            self.batch, self.heads, self.chunks, width, value_width, dtype=torch.float32, device=self.device
        )
        rows, columns = self.columns(width), self.columns(value_width)
        from .triton_kernels import state_kernel

        launch(
            state_kernel,
            self.batch * self.heads * math.ceil(width / rows) * math.ceil(value_width / columns),
            self.device,
            Tile(self.chunk, columns, 4, 2),
            *(b, c, None if self.log is None else unit_stride(self.log), start, states, final, *b.stride()[:3]),
            *(*c.stride()[:3], self.log_stride(), *(start.stride() if start is not None else (0, 0, 0, 0))),
            *(self.heads, b.shape[2], self.tokens, self.chunks, scale),
            D=width,
            DV=value_width,
            BK=rows,
            BN=columns,
            REVERSE=reverse,
            **self.options(),
        )
        return states

    def output(
        self,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        forwards: Tensor | None,
        backwards: Tensor | None,
        out: Tensor,
        scale_inside: float,
        scale_state: float,
        *,
        transposed: bool = False,
    ) -> None:
        """Rows of all chunks; ``transposed``: the states are stored as (Dv, D) of this product."""
        a, b, c = unit_stride(a), unit_stride(b), unit_stride(c)
        width, value_width = b.shape[3], c.shape[3]
        columns = self.columns(value_width)
        chunks = math.ceil(a.shape[2] / self.chunk)
        from .triton_kernels import output_kernel

        interpreted = self.options()["UPCAST"]
        wide = {torch.float32: self.options()["PRECISION"], torch.float16: "tf32", torch.bfloat16: "ieee"}[self.dtype]
        launch(
            output_kernel,
            self.batch * self.heads * chunks * math.ceil(value_width / columns),
            self.device,
            Tile(self.chunk, columns, 4, 2),
            *(a, b, c, None if self.log is None else unit_stride(self.log), forwards, backwards, out),
            *(*a.stride()[:3], *b.stride()[:3], *c.stride()[:3], self.log_stride()),
            *(*((1, width) if transposed else (value_width, 1)), *out.stride()[:3], self.heads, a.shape[2]),
            *(b.shape[2], self.tokens, chunks, self.chunks, scale_inside, scale_state),
            D=width,
            DV=value_width,
            BK=min(self.columns(width), 32 if self.dtype != torch.bfloat16 else 64),
            BN=columns,
            NARROW=self.dtype == torch.bfloat16 and not interpreted,
            WIDE_PRECISION="ieee" if interpreted else wide,
            **self.options(),
        )


linear_attention = LINEAR_ATTENTION.register("triton", forward, backward)


def aot_cases(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Runs on meta tensors that reach both kernels in every dtype, with one walk and with two."""
    few = [(torch.bfloat16, 128, True, True), (torch.float32, 64, True, True)]
    rest = [
        (torch.bfloat16, 64, False, False),
        (torch.bfloat16, 256, False, True),
        (torch.float16, 128, True, False),
        (torch.float16, 40, False, True),
        (torch.float32, 128, False, True),
        (torch.float32, 256, True, False),
    ]
    for dtype, width, causal, decay in few if quick else few + rest:
        label = f"{str(dtype).removeprefix('torch.')} {width}{' causal' if causal else ''}{' decay' if decay else ''}"
        yield label, functools.partial(_aot_run, dtype, width, causal, decay)


def _aot_run(dtype: torch.dtype, width: int, causal: bool, decay: bool, tokens: int = 4096) -> None:
    def meta(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    q, k, v = (meta(2, tokens, 8, width).transpose(1, 2) for _ in range(3))
    state = meta(2, 8, width, width, kind=torch.float32)
    log = meta(1, 8, kind=torch.float32) if decay else None
    a = Arguments(q, k, v, log, state, causal, 1.0, False, 0.0, 0)
    out, final, denominator = forward(a)
    grads = (torch.empty_like(out), torch.empty_like(final))
    backward(grads, (out, final, denominator), a, (True, True, True, False, True))
