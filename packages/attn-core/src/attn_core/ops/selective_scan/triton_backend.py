"""Selective scan on a GPU: tile choice, launches, registration; kernels in ``triton_kernels``.

This file imports without Triton. Memory beyond the results: the states at the starts of tiles (T/steps·C·N float32),
and in the backward pass parts of dB and dC, T·N float32 for every few channels.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from attn_core.kernels.launch import Tile, launch, power_of_two, unit_stride
from attn_core.kernels.registration import register

from .torch_backend import plain_reference

STEPS = 16
MAX_CHANNELS = 8
# Numbers of a tile: about ten arrays of them are held in the registers of the backward kernel's four warps.
TILE_NUMBERS = 2048
FORWARD_WARPS, BACKWARD_WARPS = 2, 4


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state, and the states at the starts of the tiles (B, tiles, C, N)."""
    from .triton_kernels import forward_kernel

    out, state, starts = fake_forward(u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse)
    problem = _Problem(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    start = None if initial_state is None else unit_stride(initial_state)
    launch(
        forward_kernel,
        problem.programs,
        u.device,
        Tile(STEPS, problem.channels, FORWARD_WARPS, 1),
        *problem.tensors,
        start,
        out,
        state,
        starts,
        *problem.strides,
        *(start.stride()[:2] if start is not None else (0, 0)),
        *problem.sizes,
        **problem.constants,
    )
    return out, state, starts


def backward(
    grad_out: Tensor,
    grad_state: Tensor | None,
    starts: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
    needs: list[bool],
) -> list[Tensor]:
    from .triton_kernels import backward_kernel

    problem = _Problem(u, delta, A, B, C, D, z, delta_bias, delta_softplus, reverse)
    batch, channels, steps = u.shape
    groups, width = B.shape[1:3]
    du, d_delta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, delta))
    dz = None if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    dA, d_initial = (starts.new_empty(batch, channels, width) for _ in range(2))
    dD, d_bias = (starts.new_empty(batch, channels) for _ in range(2))
    parts = [starts.new_empty(batch, groups, channels // groups // problem.channels, steps, width) for _ in range(2)]
    grad_out = unit_stride(grad_out)
    grad_last = None if grad_state is None else unit_stride(grad_state)
    launch(
        backward_kernel,
        problem.programs,
        u.device,
        Tile(STEPS, problem.channels, BACKWARD_WARPS, 1),
        *problem.tensors,
        starts,
        grad_out,
        grad_last,
        du,
        d_delta,
        dA,
        *parts,
        dD,
        dz,
        d_bias,
        d_initial,
        *problem.strides,
        *grad_out.stride()[:2],
        *(grad_last.stride()[:2] if grad_last is not None else (0, 0)),
        *problem.sizes,
        **problem.constants,
    )
    dB, dC = (part.sum(2).mT for part in parts)
    gradients = (du, d_delta, dA, dB, dC, dD, dz, d_bias, d_initial)
    arguments = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return [
        grad.sum_to_size(x.shape).to(x.dtype).contiguous()
        for grad, x, need in zip(gradients, arguments, needs, strict=True)
        if need and grad is not None and x is not None
    ]


def fake_forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    delta_softplus: bool,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, steps = u.shape
    state = u.new_empty(batch, channels, A.shape[-1], dtype=torch.float32)
    starts = u.new_empty(batch, (steps + STEPS - 1) // STEPS, *state.shape[1:], dtype=torch.float32)
    return u.new_empty(u.shape), state, starts


class _Problem:
    """Arguments that both kernels take, in the kernels' order."""

    def __init__(
        self,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        reverse: bool,
    ) -> None:
        tensors = (u, delta, A, B, C, D, z, delta_bias)
        self.tensors = [None if x is None else unit_stride(x) for x in tensors]
        u, delta, A, B, C, D, z, delta_bias = self.tensors  # pyright: ignore[reportAssignmentType]
        batch, channels, steps = u.shape
        groups, width = B.shape[1:3]
        block_n = power_of_two(width)
        per_group = channels // groups
        fit = max(1, min(MAX_CHANNELS, TILE_NUMBERS // (STEPS * block_n)))
        self.channels = math.gcd(per_group, fit)
        self.programs = batch * channels // self.channels
        self.strides = (
            *u.stride()[:2],
            *delta.stride()[:2],
            *(0 if A.shape[0] == 1 else A.stride(0), A.stride(1)),
            *B.stride()[:3],
            *C.stride()[:3],
            0 if D is None or D.shape[0] == 1 else D.stride(0),
            *((0, 0) if z is None else z.stride()[:2]),
            0 if delta_bias is None or delta_bias.shape[0] == 1 else delta_bias.stride(0),
        )
        self.sizes = (channels, per_group, steps, math.ceil(steps / STEPS))
        self.constants: dict[str, Any] = {
            "N": width,
            "BT": STEPS,
            "BD": self.channels,
            "BN": block_n,
            "SOFTPLUS": delta_softplus,
            "REVERSE": reverse,
        }


_selective_scan = register(
    "selective_scan_triton",
    forward=forward,
    backward=backward,
    fake_forward=fake_forward,
    reference=plain_reference,
    differentiable=("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"),
    residuals=1,
    keeps_outputs=False,
)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    *,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """See :func:`attn_core.selective_scan`."""
    skip, bias = (None if x is None else x[None] for x in (D, delta_bias))
    return _selective_scan(u, delta, A[None], B, C, skip, z, bias, initial_state, delta_softplus, reverse)


def aot_cases(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Runs on meta tensors that reach every tile: state widths that take 8, 4, 2 and 1 channels."""
    few = [(torch.bfloat16, 16, True)]
    rest = [(torch.float32, 16, True), (torch.float16, 1, False), *((torch.bfloat16, n, True) for n in (32, 64, 128))]
    for dtype, width, everything in few if quick else few + rest:
        label = f"{str(dtype).removeprefix('torch.')} {width}{' everything' if everything else ''}"
        yield label, functools.partial(_aot_run, dtype, width, everything)


def _aot_run(dtype: torch.dtype, width: int, everything: bool) -> None:
    def meta(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    u, z = (meta(2, 192, 784, kind=dtype) for _ in range(2))
    maps = [meta(2, 2, width, 784, kind=dtype) for _ in range(2)]
    options = [meta(1, 192), z, meta(1, 192), meta(2, 192, width)] if everything else [None] * 4
    problem: list[Any] = [u, meta(2, 192, 784), meta(1, 192, width), *maps, *options, everything, everything]
    out, state, starts = forward(*problem)
    needs = [True] * 5 + [everything] * 4
    backward(torch.empty_like(out), torch.empty_like(state), starts, *problem, needs=needs)
