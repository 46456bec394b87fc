"""Fused neighborhood attention: boxes, launches and registration; kernels in ``triton_forward``, ``triton_backward``.

This file imports without Triton. Memory beyond the results: the log-sum-exp, δ (B, H, N) in the backward pass, and for
the gradient of the bias one float32 row of the table for each box of queries.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_core.kernels.delta import row_delta
from attn_core.kernels.launch import (
    Tile,
    architecture,
    broadcast_strides,
    launch,
    power_of_two,
    product_options,
    unit_stride,
)
from attn_core.kernels.registration import Grads, empty_gradient

from . import torch_backend
from .boxes import box, dilations, three, tiles
from .reference import NEIGHBORHOOD_ATTENTION, Arguments, fake
from .triton_config import Pass, choose_tile

LOG2E = math.log2(math.e)


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """One program for each head and tile of cells."""
    from .triton_forward import forward_kernel

    out, lse = fake(a)
    if a.q.numel() == 0 or a.v.numel() == 0:
        return out.zero_(), lse.fill_(-math.inf)
    _Problem(a).launch("forward", forward_kernel, (out, lse, *out.stride()[:3]))
    return out, lse


def backward(grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:
    """One pass by queries, one by keys over the windows that reach them."""
    from .triton_backward import key_kernel, query_kernel

    (grad_out, grad_lse), (out, lse), (q, k, v, rpb, *_) = grads, kept, a
    assert grad_out is not None
    if q.numel() == 0 or v.numel() == 0:
        return [None if t is None else torch.zeros_like(t) for t in (q, k, v, rpb)]
    need_q, need_k, need_v, need_rpb = needs
    problem = _Problem(a)
    batch, heads = q.shape[:2]
    grad_out, out = unit_stride(grad_out), unit_stride(out)
    delta = row_delta(grad_out, out, lse, grad_lse, problem.block_dv)
    incoming = (grad_out, lse, delta, *grad_out.stride()[:3], a.scale)

    dq = empty_gradient(q, True) if need_q else None
    drpb = shares = None
    if rpb is not None and need_rpb:
        if torch.are_deterministic_algorithms_enabled():
            # Additions of one program to one entry come in any order; the torch backend has a fixed one.
            only = (False, False, False, True)
            *_, drpb = torch_backend.backward((grad_out, grad_lse), (out, lse), a, only)
        else:
            shares = rpb.new_zeros(batch, heads, problem.tiles("query"), rpb[0, 0].numel(), dtype=torch.float32)
    if dq is not None or shares is not None:
        strides = dq.stride()[:3] if dq is not None else (0, 0, 0)
        size = rpb[0, 0].numel() if rpb is not None else 0
        problem.launch("query", query_kernel, (*incoming, dq, shares, *strides, size))
    if shares is not None and rpb is not None:
        drpb = shares.sum(2).unflatten(2, rpb.shape[2:])
    dk = empty_gradient(k, True) if need_k else None
    dv = empty_gradient(v, True) if need_v else None
    # Both accumulators of wide heads at once would not fit the registers: one pass for each.
    wide = max(problem.block_d, problem.block_dv) > 128
    for own_dk, own_dv in ((dk, None), (None, dv)) if wide else ((dk, dv),):
        if own_dk is not None or own_dv is not None:
            strides = [s for x in (own_dk, own_dv) for s in (x.stride()[:3] if x is not None else (0, 0, 0))]
            problem.launch("key", key_kernel, (*incoming, own_dk, own_dv, *strides))
    return [dq, dk, dv, drpb]


class _Problem:
    """What every kernel takes, in the kernels' order; grids of fewer than three axes get axes of length 1 in front."""

    def __init__(self, a: Arguments) -> None:
        q, k, v, rpb, grid, kernel_size, dilation, stride, is_causal, scale, border = a
        self.q, self.k, self.v = unit_stride(q), unit_stride(k), unit_stride(v)
        self.rpb = None if rpb is None else rpb.flatten(2).contiguous()
        self.axes, self.scale, self.shifted = len(grid), scale, border == "shifted"
        self.grid, self.kernel, self.stride = (three(x) for x in (grid, kernel_size, stride))
        self.dilation = dilations(dilation, self.grid)
        self.causal = (*[False] * (3 - self.axes), *is_causal)
        self.block_d, self.block_dv = power_of_two(q.shape[3], 16), power_of_two(v.shape[3], 16)

    def tile(self, kernel: Pass) -> Tile:
        width = max(self.block_d, self.block_dv)
        return choose_tile(kernel, width, self.q.dtype, architecture(self.q.device), self.rpb is not None)

    def sides(self, kernel: Pass) -> list[int]:
        """Of the box of a tile: of keys in the pass over them, else of queries."""
        tile = self.tile(kernel)
        return box(self.grid, self.dilation, tile.columns if kernel == "key" else tile.rows)

    def counts(self, kernel: Pass) -> list[int]:
        return tiles(self.grid, self.dilation, self.sides(kernel))

    def tiles(self, kernel: Pass) -> int:
        return math.prod(self.counts(kernel))

    def launch(self, kernel: Pass, function: Any, arguments: tuple[Any, ...]) -> None:
        q, tile = self.q, self.tile(kernel)
        launch(
            function,
            q.shape[0] * q.shape[1] * self.tiles(kernel),
            q.device,
            tile,
            *(q, self.k, self.v, self.rpb, *q.stride()[:3], *self.k.stride()[:3], *self.v.stride()[:3]),
            *(*(broadcast_strides(self.rpb)[:2] if self.rpb is not None else (0, 0)), *q.shape[1:3], *self.grid),
            *(*self.kernel, *self.dilation, *self.stride, *self.counts(kernel), self.scale * LOG2E, *arguments),
            D=q.shape[3],
            DV=self.v.shape[3],
            BLOCK_D=self.block_d,
            BLOCK_DV=self.block_dv,
            BM=tile.rows,
            BN=tile.columns,
            **dict(zip(("T0", "T1", "T2"), self.sides(kernel), strict=True)),
            AXES=self.axes,
            **dict(zip(("C0", "C1", "C2"), self.causal, strict=True)),
            SHIFTED=self.shifted,
            **product_options(q.dtype),
        )


neighborhood_attention = NEIGHBORHOOD_ATTENTION.register("triton", forward, backward)


AOT_FORMS: dict[str, dict[str, Any]] = {
    "sequence, causal": {"grid": (4096,), "kernel": 255, "causal": True},
    "image": {"grid": (56, 56), "kernel": 7},
    "image, bias, dilation": {"grid": (56, 56), "kernel": 7, "rpb": True, "dilation": 8},
    "volume, bias": {"grid": (16, 20, 24), "kernel": 5, "rpb": True},
    "volume, truncated, stride": {"grid": (16, 20, 24), "kernel": 5, "border": "truncated", "stride": 3},
}


def aot_cases(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Runs on meta tensors that reach every tile of the table and every form of the kernels."""
    widths = [(torch.bfloat16, 32), (torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256)]
    widths += [(torch.float32, 64)]
    usual = [(dtype, width, form) for dtype, width in widths for form in ("volume, bias", "volume, truncated, stride")]
    usual += [(torch.float16, 40, "image, bias, dilation"), (torch.bfloat16, 64, "sequence, causal")]
    few = [(torch.bfloat16, 32, "image"), (torch.bfloat16, 64, "volume, bias")]
    for dtype, width, form in few if quick else few + usual:
        label = f"{str(dtype).removeprefix('torch.')} {width} {form}"
        yield label, functools.partial(_aot_run, dtype, width, **AOT_FORMS[form])


def _aot_run(
    dtype: torch.dtype,
    width: int,
    grid: tuple[int, ...],
    kernel: int,
    dilation: int = 1,
    stride: int = 1,
    causal: bool = False,
    rpb: bool = False,
    border: str = "shifted",
) -> None:
    batch, heads, axes = 2, 4, len(grid)

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = (meta(batch, math.prod(grid), heads, width).transpose(1, 2) for _ in range(3))
    table = meta(1, heads, *[2 * kernel - 1] * axes) if rpb else None
    rules = (list(grid), [kernel] * axes, [dilation] * axes, [stride] * axes, [causal] * axes, width**-0.5, border)
    a = Arguments(q, k, v, table, *rules)
    out, lse = forward(a)
    backward((torch.empty_like(out), torch.empty_like(lse)), (out, lse), a, [True, True, True, rpb])
