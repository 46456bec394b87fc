"""Fused additive attention: launches and registration; kernels in ``triton_kernels``. Imports without Triton.

Memory beyond the results: q's and k's gradients in float32, one row of w's gradient for each tile of queries.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from attn_core.kernels.delta import row_delta
from attn_core.kernels.launch import (
    Tile,
    architecture,
    at_width,
    broadcast_strides,
    for_small_memory,
    launch,
    power_of_two,
    product_options,
    unit_stride,
)
from attn_core.kernels.registration import Grads

from .reference import ADDITIVE_ATTENTION, Arguments, fake

Pass = Literal["forward", "query", "key"]

# kernel → padded value width (1: scores alone) → tile; every entry passes ``python -m attn_core.aot``.
TILES_16_BIT: dict[Pass, dict[int, Tile]] = {
    "forward": {1: Tile(32, 64, 4, 1), 128: Tile(32, 64, 8, 1), 256: Tile(32, 32, 8, 1)},
    "query": {1: Tile(32, 64, 4, 1), 64: Tile(32, 64, 4, 1), 256: Tile(32, 32, 8, 1)},
    "key": {1: Tile(64, 32, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(32, 32, 8, 1, repeats=True)},
}
TILES_FLOAT32: dict[Pass, dict[int, Tile]] = {
    "forward": {1: Tile(32, 64, 4, 1), 64: Tile(32, 32, 4, 1), 128: Tile(16, 16, 4, 1)},
    "query": {1: Tile(32, 64, 4, 1), 64: Tile(32, 32, 8, 1), 128: Tile(16, 32, 8, 1)},
    "key": {1: Tile(64, 32, 4, 1), 128: Tile(16, 16, 4, 1)},
}


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """One program for each image and tile of queries, online softmax over the entries."""
    from .triton_kernels import forward_kernel

    q, k = a.q, a.k
    out, lse = fake(a)
    if k.shape[1] == 0:
        return out.zero_(), lse.fill_(-math.inf)
    problem = _Problem(a)
    tile = problem.tile("forward")
    programs = q.shape[0] * math.ceil(q.shape[1] / tile.rows)
    launch(forward_kernel, programs, q.device, tile, *problem.arguments, out, lse, **problem.constants(tile))
    return out, lse


def backward(grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:
    """One pass by queries, one by keys; scores are computed again."""
    from .triton_kernels import key_kernel, query_kernel

    (grad_out, grad_lse), (out, lse), (q, k, w, value, _) = grads, kept, a
    assert grad_out is not None
    batch, queries, _ = q.shape
    keys = k.shape[1]
    needs_q, needs_k, needs_w, needs_value = needs
    problem = _Problem(a)
    delta = None
    if value is not None:
        grad_out = unit_stride(grad_out)
        rows = (None if t is None else t[:, None] for t in (grad_out, out, lse, grad_lse))  # one head
        delta = row_delta(*rows, problem.block_e)  # pyright: ignore[reportArgumentType, reportCallIssue]
    elif grad_lse is not None:
        delta = grad_lse.neg().contiguous()
    incoming = (grad_out, out, lse, delta, *grad_out.stride())

    dq = lse.new_zeros(q.shape) if needs_q else None
    dw = None
    if (needs_q or needs_w) and keys:
        tile = problem.tile("query")
        tiles = math.ceil(queries / tile.rows)
        partial = lse.new_zeros(batch, tiles, w.shape[1]) if needs_w else None
        launch(
            *(query_kernel, batch * tiles, q.device, tile, *problem.arguments, *incoming, dq, partial),
            **problem.constants(tile),
        )
        dw = None if partial is None else partial.sum(1)
    elif needs_w:
        dw = lse.new_zeros(batch, w.shape[1])
    dk = lse.new_zeros(batch, *k.shape[1:]) if needs_k else None
    dvalue = value.new_empty(batch, *value.shape[1:]) if value is not None and needs_value else None
    if dk is not None or dvalue is not None:
        tile = problem.tile("key")
        launch(
            *(key_kernel, batch * math.ceil(keys / tile.columns), q.device, tile),
            *(*problem.arguments, *incoming, dk, dvalue),
            **problem.constants(tile),
        )
    return [dq, dk, dw, dvalue]


class _Problem:
    """Arguments that every kernel takes, in the kernels' order."""

    def __init__(self, a: Arguments) -> None:
        q, k, w, value, key_mask = a
        self.q = q
        self.value = None if value is None else unit_stride(value)
        self.width = 1 if value is None else value.shape[2]
        self.block_e = 1 if value is None else power_of_two(self.width, 16)
        mask = None if key_mask is None else key_mask.view(torch.uint8)
        self.arguments = (
            *(q, k, w, self.value, mask, *q.stride()),
            *(broadcast_strides(k)[:1] + k.stride()[1:]),
            *(broadcast_strides(w)[:1] + w.stride()[1:]),
            *(broadcast_strides(self.value)[:1] + self.value.stride()[1:2] if self.value is not None else (0, 0)),
            *(broadcast_strides(mask)[:1] + mask.stride()[1:] if mask is not None else (0, 0)),
            *(q.shape[1], k.shape[1], q.shape[2]),
        )

    def tile(self, kernel: Pass) -> Tile:
        arch = architecture(self.q.device)
        if arch == "interpreter":
            return Tile(16, 32, 4, 1)
        table = TILES_FLOAT32 if self.q.dtype == torch.float32 else TILES_16_BIT
        return for_small_memory(at_width(table[kernel], self.block_e), self.block_e, self.q.dtype, arch)

    def constants(self, tile: Tile) -> dict[str, Any]:
        sizes = {"E": self.width, "BLOCK_E": self.block_e, "BM": tile.rows, "BN": tile.columns}
        return {**sizes, **product_options(self.q.dtype)}


additive_attention = ADDITIVE_ATTENTION.register("triton", forward, backward)


def aot_cases(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Runs on meta tensors that reach every tile of the table and every form of the kernels."""
    few = [(torch.bfloat16, None, True), (torch.bfloat16, 64, False), (torch.float32, 64, True)]
    rest = [
        *((torch.bfloat16, width, True) for width in (128, 200, 256)),
        *((torch.float32, width, False) for width in (None, 24, 128)),
        (torch.float16, 100, True),
    ]
    for dtype, width, masked in few if quick else few + rest:
        form = "scores" if width is None else f"value {width}"
        label = f"{str(dtype).removeprefix('torch.')} {form}{' mask' if masked else ''}"
        yield label, functools.partial(_aot_run, dtype, width, masked)


def _aot_run(dtype: torch.dtype, width: int | None, masked: bool) -> None:
    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    value = None if width is None else meta(2, 1024, width)
    mask = torch.empty(2, 1024, dtype=torch.bool, device="meta") if masked else None
    a = Arguments(meta(2, 1000, 512), meta(2, 1024, 512), meta(1, 512), value, mask)
    out, lse = forward(a)
    needs = [True] * 3 + [value is not None]
    backward((torch.empty_like(out), torch.empty_like(lse)), (out, lse), a, needs)
