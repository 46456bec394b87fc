"""Fused channel attention: launches and registration; kernels in ``triton_kernels``. Imports without Triton.

Memory beyond the results: the weights (B, H, C, C) in float32, and their gradient in the backward pass.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from attn_core.kernels.launch import (
    Tile,
    architecture,
    at_width,
    broadcast_strides,
    for_small_memory,
    launch,
    power_of_two,
    product_options,
)
from attn_core.kernels.registration import Grads, empty_gradient

from .reference import CHANNEL_ATTENTION, Arguments, fake

LOG2E = math.log2(math.e)

# kernel → padded channels → tile (gram: rows of the result × tokens, mix: tokens × channels); every entry passes
# ``python -m attn_core.aot``.
TILES_16_BIT: dict[Literal["gram", "mix"], dict[int, Tile]] = {
    "gram": {32: Tile(32, 64, 4, 3), 64: Tile(64, 64, 4, 3), 128: Tile(64, 64, 8, 2), 256: Tile(32, 64, 8, 2)},
    "mix": {32: Tile(64, 32, 4, 1), 64: Tile(64, 64, 4, 1), 128: Tile(64, 64, 8, 1), 256: Tile(64, 32, 8, 1)},
}
TILES_FLOAT32: dict[Literal["gram", "mix"], dict[int, Tile]] = {
    "gram": {64: Tile(32, 32, 4, 2), 128: Tile(16, 16, 4, 1)},
    "mix": {64: Tile(32, 32, 4, 1), 128: Tile(16, 16, 4, 1)},
}


def forward(problem: Arguments) -> tuple[Tensor, Tensor]:
    """The weights by one kernel over tokens, then their product with x by another."""
    a, b, x, scale, negate_max, transpose = problem
    y, weights = fake(problem)
    # The maximum that negate_max adds to a row cancels in its softmax.
    _gram(a, b, None, weights, -scale if negate_max else scale)
    _mix(x, weights, y, 1.0, transpose=not transpose)
    return y, weights


def backward(grads: Grads, kept: tuple[Tensor, ...], problem: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:
    """dA = dyᵀx; dE = A∘(dA − Σ_d dA∘A); da = scale·b dEᵀ; db = scale·a dE; dx = dy A."""
    (grad_y,), (weights,), (a, b, x, scale, negate_max, transpose) = grads, kept, problem
    assert grad_y is not None
    scale = -scale if negate_max else scale
    found = [
        empty_gradient(t.expand(len(weights), *t.shape[1:]), True) if need else None
        for t, need in zip((a, b, x), needs, strict=True)
    ]
    da, db, dx = found
    if dx is not None:
        _mix(grad_y, weights, dx, 1.0, transpose=transpose)
    if da is not None or db is not None:
        d_logits = torch.empty_like(weights)
        left, right = (x, grad_y) if transpose else (grad_y, x)
        _gram(left, right, weights, d_logits, 1.0)
        if da is not None:
            _mix(b, d_logits, da, scale, transpose=True)
        if db is not None:
            _mix(a, d_logits, db, scale, transpose=False)
    return found


def _gram(left: Tensor, right: Tensor, weights: Tensor | None, out: Tensor, scale: float) -> None:
    from .triton_kernels import gram_kernel

    batch, heads, channels, _ = out.shape
    tile = _tile("gram", left)
    launch(
        gram_kernel,
        batch * heads * math.ceil(channels / tile.rows),
        left.device,
        tile,
        *(left, right, weights, out, *_strides(left), *_strides(right)),
        *(heads, left.shape[2], scale * LOG2E),
        **_constants(left, tile),
    )


def _mix(x: Tensor, matrix: Tensor, out: Tensor, scale: float, *, transpose: bool) -> None:
    from .triton_kernels import mix_kernel

    batch, heads, tokens, _ = out.shape
    tile = _tile("mix", x)
    launch(
        mix_kernel,
        batch * heads * math.ceil(tokens / tile.rows),
        x.device,
        tile,
        *(x, matrix, out, *_strides(x), *out.stride()[:3], heads, tokens, scale),
        TRANSPOSE=transpose,
        **_constants(x, tile),
    )


def _strides(t: Tensor) -> tuple[int, ...]:
    return *broadcast_strides(t)[:1], *t.stride()[1:]


def _tile(kernel: Literal["gram", "mix"], t: Tensor) -> Tile:
    arch = architecture(t.device)
    if arch == "interpreter":
        return Tile(16, 16, 4, 1)
    width = power_of_two(t.shape[3], 16)
    table = TILES_FLOAT32 if t.dtype == torch.float32 else TILES_16_BIT
    return for_small_memory(at_width(table[kernel], width), width, t.dtype, arch)


def _constants(t: Tensor, tile: Tile) -> dict[str, Any]:
    sizes = {"C": t.shape[3], "BLOCK_C": power_of_two(t.shape[3], 16), "BM": tile.rows, "BN": tile.columns}
    return {**sizes, **product_options(t.dtype)}


channel_attention = CHANNEL_ATTENTION.register("triton", forward, backward)


def aot_cases(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Runs on meta tensors that reach every tile of the table and both memory orders."""
    few = [(torch.bfloat16, 32, False), (torch.float32, 32, False), (torch.bfloat16, 64, True)]
    rest = [
        *((torch.bfloat16, width, False) for width in (64, 96, 128, 256)),
        *((torch.float32, width, False) for width in (64, 96, 128)),
        *((torch.float16, width, True) for width in (20, 128, 256)),
        (torch.float32, 128, True),
    ]
    for dtype, width, tokens_innermost in few if quick else few + rest:
        label = f"{str(dtype).removeprefix('torch.')} {width}{' map' if tokens_innermost else ''}"
        yield label, functools.partial(_aot_run, dtype, width, tokens_innermost)


def _aot_run(dtype: torch.dtype, width: int, tokens_innermost: bool, tokens: int = 3136) -> None:
    def operand() -> Tensor:
        if tokens_innermost:
            return torch.empty(2, 1, width, tokens, dtype=dtype, device="meta").mT
        return torch.empty(2, tokens, 3, width, dtype=dtype, device="meta").transpose(1, 2)

    problem = Arguments(operand(), operand(), operand(), width**-0.5, False, tokens_innermost)
    y, weights = forward(problem)
    backward((torch.empty_like(y),), (weights,), problem, [True] * 3)
