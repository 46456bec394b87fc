"""Selective scan on a GPU: tile choice, launches, registration; kernels in ``triton_kernels``.

This file imports without Triton. Memory beyond the results: the states at the starts of tiles (T/steps·C·N float32),
and in the backward pass parts of dB and dC, T·N float32 for every few channels.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_core.kernels.launch import Tile, launch, power_of_two, unit_stride
from attn_core.kernels.registration import Grads

from .reference import Arguments, definition, fake

STEPS = 16
MAX_CHANNELS = 8
# Numbers of a tile: about ten arrays of them are held in the registers of the backward kernel's four warps.
TILE_NUMBERS = 2048
FORWARD_WARPS, BACKWARD_WARPS = 2, 4


def forward(x: Arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Output, last state, and the states at the starts of the tiles (B, tiles, C, N)."""
    from .triton_kernels import forward_kernel

    out, state, starts = fake(x, STEPS)
    problem = _Problem(x)
    start = None if x.initial_state is None else unit_stride(x.initial_state)
    launch(
        forward_kernel,
        problem.programs,
        x.u.device,
        Tile(STEPS, problem.channels, FORWARD_WARPS, 1),
        *(*problem.tensors, start, out, state, starts),
        *(*problem.strides, *(start.stride()[:2] if start is not None else (0, 0)), *problem.sizes),
        **problem.constants,
    )
    return out, state, starts


def backward(grads: Grads, kept: tuple[Tensor, ...], x: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:  # noqa: ARG001  the backends' signature
    """One program for each tile of channels, over chunks from the end, each computed again from its start."""
    from .triton_kernels import backward_kernel

    (grad_out, grad_state), (starts,) = grads, kept
    assert grad_out is not None
    u, z, problem = x.u, x.z, _Problem(x)
    batch, channels, steps = u.shape
    width = x.A.shape[2]
    du, d_delta = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, x.delta))
    dz = None if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    dA, d_initial = (starts.new_empty(batch, channels, width) for _ in range(2))
    dD, d_bias = (starts.new_empty(batch, channels) for _ in range(2))
    parts = []
    for given, constant in ((x.B, problem.constants["CONST_B"]), (x.C, problem.constants["CONST_C"])):
        blocks = channels // given.shape[1] // problem.channels
        shape = (channels, width) if constant else (given.shape[1], blocks, steps, width)
        parts.append(starts.new_empty(batch, *shape))
    grad_out = unit_stride(grad_out)
    grad_last = None if grad_state is None else unit_stride(grad_state)
    launch(
        backward_kernel,
        problem.programs,
        u.device,
        Tile(STEPS, problem.channels, BACKWARD_WARPS, 1),
        *(*problem.tensors, starts, grad_out, grad_last, du, d_delta, dA, *parts, dD, dz, d_bias, d_initial),
        *(*problem.strides, *grad_out.stride()[:2], *(grad_last.stride()[:2] if grad_last is not None else (0, 0))),
        *problem.sizes,
        **problem.constants,
    )
    dB, dC = (part.unsqueeze(-1) if part.ndim == 3 else part.sum(2).mT for part in parts)
    return [du, d_delta, dA, dB, dC, dD, dz, d_bias, d_initial]


class _Problem:
    """Arguments that both kernels take, in the kernels' order."""

    def __init__(self, x: Arguments) -> None:
        self.tensors: list[Any] = [None if t is None else unit_stride(t) for t in x[:8]]
        u, delta, A, B, C, D, z, delta_bias = self.tensors
        batch, channels, steps = u.shape
        width = A.shape[2]
        block_n = power_of_two(width)
        # Maps that are the same at every step have no groups: every channel has its own.
        constant = [given.shape[1] == channels and given.shape[3] == 1 for given in (B, C)]
        groups = [given.shape[1] for given, own in zip((B, C), constant, strict=True) if not own]
        per_group = channels // (groups[0] if groups else 1)
        # The gradient of a constant map is one more array of states.
        numbers = TILE_NUMBERS // 2 if any(constant) else TILE_NUMBERS
        fit = max(1, min(MAX_CHANNELS, numbers // (STEPS * block_n)))
        self.channels = math.gcd(per_group, fit)
        self.programs = batch * channels // self.channels
        self.strides = (
            *u.stride()[:2],
            *delta.stride()[:2],
            *(0 if A.shape[0] == 1 else A.stride(0), A.stride(1)),
            *(0 if B.shape[0] == 1 else B.stride(0), *B.stride()[1:3]),
            *(0 if C.shape[0] == 1 else C.stride(0), *C.stride()[1:3]),
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
            "SOFTPLUS": x.delta_softplus,
            "REVERSE": x.reverse,
            "CONST_B": constant[0],
            "CONST_C": constant[1],
        }


selective_scan = definition(STEPS).register("triton", forward, backward)


def aot_cases(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Runs on meta tensors that reach every tile: state widths that take 8, 4, 2 and 1 channels."""
    few = [(torch.bfloat16, 16, True)]
    rest = [(torch.float32, 16, True), (torch.float16, 1, False), *((torch.bfloat16, n, True) for n in (32, 64, 128))]
    for dtype, width, everything in few if quick else few + rest:
        label = f"{str(dtype).removeprefix('torch.')} {width}{' everything' if everything else ''}"
        yield label, functools.partial(_aot_run, dtype, width, everything)
    for width, constant in () if quick else ((16, "B"), (16, "BC"), (128, "BC")):
        yield (
            f"bfloat16 {width} constant {constant}",
            functools.partial(_aot_run, torch.bfloat16, width, True, constant),
        )


def _aot_run(dtype: torch.dtype, width: int, everything: bool, constant: str = "") -> None:
    def meta(*shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=kind, device="meta")

    u, z = (meta(2, 192, 784, kind=dtype) for _ in range(2))
    maps = [meta(1, 192, width, 1) if name in constant else meta(2, 2, width, 784, kind=dtype) for name in "BC"]
    options = [meta(1, 192), z, meta(1, 192), meta(2, 192, width)] if everything else [None] * 4
    x = Arguments(u, meta(2, 192, 784), meta(1, 192, width), *maps, *options, everything, everything)  # pyright: ignore[reportCallIssue]
    out, state, starts = forward(x)
    backward((torch.empty_like(out), torch.empty_like(state)), (starts,), x, [True] * 5 + [everything] * 4)
