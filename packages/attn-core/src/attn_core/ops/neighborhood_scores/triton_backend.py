"""Window scores on a GPU, and the launches that sums over windows share; kernels in ``triton_kernels``.

This file imports without Triton. Memory beyond the results: the gradient of the bias for each image, float32.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from attn_core.kernels.launch import (
    OLDER,
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
from attn_core.kernels.registration import Grads, empty_gradient
from attn_core.ops.neighborhood_attention.boxes import box, dilations, three, tiles

from .reference import NEIGHBORHOOD_SCORES, Arguments, empty_slot, fake

# Width bucket → tiles for sm_80 and for sm_90 on: cells of the box, cells of a step, warps, stages.
TILES_16_BIT: dict[int, tuple[Tile, Tile]] = {
    64: (Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
    128: (Tile(64, 32, 8, 2), Tile(64, 32, 8, 2)),
    256: (Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
}
# What walks queries, whose windows it computes at each step, where four warps would spill.
KEYS_TILE = Tile(64, 32, 8, 2)
# float32 is multiplied without tensor cores: small tiles, the same for every architecture.
TILES_FLOAT32: dict[int, Tile] = {64: Tile(32, 32, 8, 1), 128: Tile(16, 16, 4, 1)}
BIAS_TILE = Tile(16, 64, 4, 1)  # offsets, cells of a step


class Rules(Protocol):
    """The windows of either operator."""

    grid: Sequence[int]
    kernel_size: Sequence[int]
    dilation: Sequence[int]
    is_causal: Sequence[bool]
    border: str


def forward(a: Arguments) -> Tensor:
    """One program for each head and box of cells."""
    out = fake(a)
    if out.numel():
        scores_into(out, a.q, a.k, a.rpb, a, empty_slot(a.border))  # pyright: ignore[reportArgumentType]
    return out


def backward(grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:  # noqa: ARG001  the backends' signature
    """Sums over windows for dq, over the queries that hold a key for dk, over all cells for each entry of drpb."""
    (grad,) = grads
    assert grad is not None
    if grad.numel() == 0:
        return [None if x is None else torch.zeros_like(x) for x in (a.q, a.k, a.rpb)]
    grad = unit_stride(grad)
    dq = sums_into(empty_gradient(a.q, False), grad, a.k, a) if needs[0] else None  # pyright: ignore[reportArgumentType]
    dk = keys_into(empty_gradient(a.k, False), grad, a.q, a) if needs[1] else None  # pyright: ignore[reportArgumentType]
    drpb = bias_gradient(grad, a).view(a.q.shape[0], *a.rpb.shape[1:]) if a.rpb is not None and needs[2] else None  # pyright: ignore[reportArgumentType]
    return [dq, dk, drpb]


def choose_tile(width: int, dtype: torch.dtype, arch: str, walks_queries: bool) -> Tile:
    """Tile of all kernels but that of the bias: every entry passes ``python -m attn_core.aot``."""
    if arch == "interpreter":
        return Tile(16, 32, 4, 1)
    if dtype == torch.float32:
        tile = at_width(TILES_FLOAT32, width)
    elif walks_queries and width <= 64:
        tile = KEYS_TILE
    else:
        tile = at_width(TILES_16_BIT, width)[0 if arch in OLDER else 1]
    return for_small_memory(tile, width, dtype, arch)


def has_empty_slots(rules: Rules) -> bool:
    """Whether some slot holds no key: causal windows at the start, and those that end with the grid."""
    return rules.border != "shifted" or any(rules.is_causal)


def scores_into(out: Tensor, q: Tensor, k: Tensor, rpb: Tensor | None, rules: Rules, empty: float) -> Tensor:
    """out (B, H, N, S) = q·k of every slot + rpb; ``empty`` in slots without a key."""
    from .triton_kernels import scores_kernel

    if has_empty_slots(rules):
        out.fill_(empty)
    q, k = unit_stride(q), unit_stride(k)
    table = None if rpb is None else rpb.flatten(2).contiguous()
    strides = broadcast_strides(table)[:2] if table is not None else (0, 0)
    strides = (*q.stride()[:3], *k.stride()[:3], *strides, *out.stride()[:3])
    _launch(scores_kernel, rules, q, (q, k, table, out), strides)
    return out


def sums_into(out: Tensor, p: Tensor, v: Tensor, rules: Rules) -> Tensor:
    """out (B, H, N, D) = Σ over slots of p · v."""
    from .triton_kernels import sums_kernel

    p, v = unit_stride(p), unit_stride(v)
    _launch(sums_kernel, rules, v, (p, v, out), (*p.stride()[:3], *v.stride()[:3], *out.stride()[:3]))
    return out


def keys_into(out: Tensor, p: Tensor, q: Tensor, rules: Rules) -> Tensor:
    """out (B, H, N, D) = Σ of p·q over the queries and slots that hold the key."""
    from .triton_kernels import keys_kernel

    p, q = unit_stride(p), unit_stride(q)
    _launch(keys_kernel, rules, q, (p, q, out), (*p.stride()[:3], *q.stride()[:3], *out.stride()[:3]))
    return out


def bias_gradient(p: Tensor, rules: Rules) -> Tensor:
    """Σ of p over the cells of each image, by offset of key from query: (B, H, R), float32."""
    from .triton_kernels import bias_kernel

    entries = math.prod(2 * size - 1 for size in rules.kernel_size)
    out = p.new_empty(*p.shape[:2], entries, dtype=torch.float32)
    grid = three(rules.grid)
    launch(
        bias_kernel,
        p.shape[0] * p.shape[1] * math.ceil(entries / BIAS_TILE.rows),
        p.device,
        BIAS_TILE,
        *(p, out, *p.stride()[:3], p.shape[1], *grid, *three(rules.kernel_size), *dilations(rules.dilation, grid)),
        BM=BIAS_TILE.rows,
        BN=BIAS_TILE.columns,
        **_constants(rules),
    )
    return out


def _launch(kernel: Any, rules: Rules, like: Tensor, tensors: Sequence[Any], strides: Sequence[int]) -> None:
    """``like`` (B, H, N, D) is what is multiplied."""
    grid = three(rules.grid)
    steps = dilations(rules.dilation, grid)
    block_d = power_of_two(like.shape[3], 16)
    tile = choose_tile(block_d, like.dtype, architecture(like.device), kernel.__name__ == "keys_kernel")
    sides = box(grid, steps, tile.rows)
    counts = tiles(grid, steps, sides)
    launch(
        kernel,
        like.shape[0] * like.shape[1] * math.prod(counts),
        like.device,
        tile,
        *(*tensors, *strides, like.shape[1], *grid, *three(rules.kernel_size), *steps, *counts),
        D=like.shape[3],
        BLOCK_D=block_d,
        BM=tile.rows,
        BN=tile.columns,
        **dict(zip(("T0", "T1", "T2"), sides, strict=True)),
        **_constants(rules),
        **product_options(like.dtype),
    )


def _constants(rules: Rules) -> dict[str, Any]:
    causal = (*[False] * (3 - len(rules.grid)), *rules.is_causal)
    flags = dict(zip(("C0", "C1", "C2"), causal, strict=True))
    return {"AXES": len(rules.grid), **flags, "SHIFTED": rules.border == "shifted"}


neighborhood_scores = NEIGHBORHOOD_SCORES.register("triton", forward, backward)


AOT_FORMS: dict[str, dict[str, Any]] = {
    "sequence, causal": {"grid": (4096,), "kernel": 127, "causal": True},
    "image, bias": {"grid": (56, 56), "kernel": 7, "bias": True},
    "image, dilation, zero": {"grid": (56, 56), "kernel": 15, "dilation": 2, "border": "zero"},
    "volume, bias": {"grid": (16, 20, 24), "kernel": 5, "bias": True},
    "volume, truncated": {"grid": (16, 20, 24), "kernel": 5, "border": "truncated"},
}
AOT_WIDTHS = [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 64)]
AOT_WIDTHS += [(torch.float32, 128)]


def aot_forms(quick: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Labels and arguments of runs on meta tensors that reach every tile and every form of the kernels."""
    few = [(torch.bfloat16, 32, "image, bias")]
    usual = [(dtype, width, form) for dtype, width in AOT_WIDTHS for form in ("volume, bias", "volume, truncated")]
    usual += [(torch.float16, 40, "image, dilation, zero"), (torch.bfloat16, 64, "sequence, causal")]
    for dtype, width, form in few if quick else few + usual:
        yield f"{str(dtype).removeprefix('torch.')} {width} {form}", {"dtype": dtype, "width": width, **AOT_FORMS[form]}


def aot_cases(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Runs on meta tensors."""
    for label, form in aot_forms(quick):
        yield label, functools.partial(_aot_run, **form)


def _aot_run(
    dtype: torch.dtype,
    width: int,
    grid: tuple[int, ...],
    kernel: int,
    dilation: int = 1,
    causal: bool = False,
    bias: bool = False,
    border: str = "shifted",
) -> None:
    axes = len(grid)
    q, k = (torch.empty(2, math.prod(grid), 4, width, dtype=dtype, device="meta").transpose(1, 2) for _ in range(2))
    table = torch.empty(1, 4, *[2 * kernel - 1] * axes, dtype=dtype, device="meta") if bias else None
    a = Arguments(q, k, table, list(grid), [kernel] * axes, [dilation] * axes, [causal] * axes, border)
    backward((torch.empty_like(forward(a)),), (), a, [True, True, bias])
