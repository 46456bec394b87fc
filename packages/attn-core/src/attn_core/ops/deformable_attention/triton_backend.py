"""Fused deformable attention: launches and registration; kernels in ``triton_kernels``.

This file imports without Triton. Memory beyond the results: float32 sums of the gradients of value and depth. Many
programs add to them in any order; when torch allows deterministic algorithms alone, the torch backend does the backward
pass.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_core.kernels.launch import Tile, architecture, launch, power_of_two, unit_stride
from attn_core.kernels.registration import Grads

from . import torch_backend
from .reference import DEFORMABLE_ATTENTION, Arguments, fake


def forward(a: Arguments) -> Tensor:
    """One program for each tile of pairs of query and head."""
    from .triton_kernels import forward_kernel

    out = fake(a)
    if out.numel() == 0:
        return out
    _Problem(a).launch(forward_kernel, (out,))
    return out


def backward(grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:
    """Programs as in the forward pass; d_value by atomic sums, or by torch where results must repeat."""
    from .triton_kernels import backward_kernel

    (grad_out,), (value, locations, weights, depth, _) = grads, a
    assert grad_out is not None
    if torch.are_deterministic_algorithms_enabled() or grad_out.numel() == 0:
        return torch_backend.backward(grads, kept, a, needs)
    d_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device) if needs[0] else None
    d_locations = torch.empty(locations.shape, dtype=torch.float32, device=value.device)
    d_weights = torch.empty(weights.shape, dtype=torch.float32, device=value.device)
    d_depth = None
    if depth is not None and needs[3]:
        d_depth = torch.zeros(depth.shape, dtype=torch.float32, device=value.device)
    grad_out = unit_stride(grad_out)
    problem = _Problem(a)
    sums = (d_value, d_locations, d_weights, d_depth)
    problem.launch(backward_kernel, (grad_out, *grad_out.stride()[:2], *sums, value.shape[1]))
    return [*sums]


class _Problem:
    """What both kernels take, in their order."""

    def __init__(self, a: Arguments) -> None:
        value, locations, weights, depth, shapes = a
        self.value, self.levels, self.points = unit_stride(value), len(shapes) // 2, locations.shape[4]
        self.locations, self.weights = locations.contiguous(), weights.contiguous()
        self.depth = None if depth is None else unit_stride(depth)
        self.shapes = _sizes_on(tuple(shapes), value.device)

    def launch(self, kernel: Any, arguments: tuple[Any, ...]) -> None:
        batch, _, heads, width = self.value.shape
        queries, pairs = self.locations.shape[1], batch * self.locations.shape[1] * heads
        block = power_of_two(width)
        tile = choose_tile(block, architecture(self.value.device), self.depth is not None)
        depth_strides = (0, 0, 0)
        if self.depth is not None:
            depth_strides = (_batch_stride(self.depth), *self.depth.stride()[1:3])
        launch(
            kernel,
            math.ceil(pairs / tile.rows),
            self.value.device,
            tile,
            *(self.value, self.shapes, self.locations, self.weights, self.depth, *self.value.stride()[:3]),
            *(_batch_stride(self.locations), _batch_stride(self.weights), *depth_strides),
            *(queries, heads, 1 if self.depth is None else self.depth.shape[3], pairs, *arguments),
            D=width,
            BLOCK_D=block,
            BM=tile.rows,
            L=self.levels,
            P=self.points,
            X=self.locations.shape[5],
        )


@functools.lru_cache(maxsize=256)
def _sizes_on(shapes: tuple[int, ...], device: torch.device) -> Tensor:
    """Map sizes on the device, copied in the first call alone: a later one may be captured in a CUDA graph."""
    return torch.tensor(shapes, dtype=torch.int32).to(device)


def _batch_stride(x: Tensor) -> int:
    """0 where one batch entry serves all, as under vmap."""
    return 0 if x.shape[0] == 1 else x.stride(0)


def choose_tile(width: int, arch: str, depth: bool) -> Tile:
    """Pairs of a program: about 512 numbers of a gathered tile, for every architecture; half where depth is read, too.

    Addresses and slopes of two depth bins would not stay in registers beside the larger tile.
    """
    if arch == "interpreter":
        return Tile(32, 0, 4, 1)
    return Tile(max(1, min(32, (256 if depth else 512) // width)), 0, 4, 1)


deformable_attention = DEFORMABLE_ATTENTION.register("triton", forward, backward)


def aot_cases(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Runs on meta tensors that reach every form of the kernels."""
    few = [(torch.bfloat16, 32, 0), (torch.bfloat16, 32, 112)]
    usual = [
        (dtype, width, bins) for dtype in (torch.float32, torch.float16) for width in (20, 256) for bins in (0, 56)
    ]
    for dtype, width, bins in few if quick else few + usual:
        label = f"{str(dtype).removeprefix('torch.')} {width}{f', {bins} bins' if bins else ''}"
        yield label, functools.partial(_aot_run, dtype, width, bins)


def _aot_run(dtype: torch.dtype, width: int, bins: int) -> None:
    batch, heads, queries, points, maps = 2, 8, 900, 4, [50, 84, 25, 42, 13, 21, 7, 11]
    cells, levels = sum(h * w for h, w in zip(maps[::2], maps[1::2], strict=True)), len(maps) // 2

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    value, weights = meta(batch, cells, heads, width), meta(batch, queries, heads, levels, points)
    locations = meta(*weights.shape, 3 if bins else 2, dtype=torch.float32)
    depth = meta(batch, cells, heads, bins) if bins else None
    a = Arguments(value, locations, weights, depth, maps)
    out = forward(a)
    backward((torch.empty_like(out),), (), a, [True, True, True, bins > 0])
