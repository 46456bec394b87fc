"""Neighborhood attention in plain torch: dense attention of box-shaped tiles of queries to the box of keys they see.

Memory beyond the results: one tile of keys and the biases of distinct tiles; the scores of one tile for drpb.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_core import torch_internals
from attn_core.kernels.registration import Grads, token_major, token_major_copy
from attn_core.ops.attention.chunked import chunked_backward, chunked_forward, row_shift
from attn_core.ops.attention.cpu_flash import empty_result, flash_backward, flash_forward

from .reference import NEIGHBORHOOD_ATTENTION, Arguments, fake, reference
from .windows import Axis, Pattern, Span, extents, outer, spans

# Entries of tile biases, and of their gradients, that are kept for tiles of equal shape: 2²³ float32 are 32 MiB.
KEPT_BIASES = 2**23
# Entries of a mask that is kept between calls: 2¹⁷ float32 are 512 KiB.
SMALL_BIAS = 2**17


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """Tiles of cells that share their keys, each one masked call of attention."""
    q, k, v = a.q, a.k, a.v
    if q.numel() == 0 or v.numel() == 0:
        return empty_result(q, v)
    if a.rpb is None and q.is_cpu and q.shape[3] == v.shape[3] and q.stride(3) == k.stride(3) == v.stride(3) == 1:
        bias = _whole_bias(*_rules(a), q.dtype)
        if bias is not None:  # each query sees itself: nothing of what flash_forward mends can happen
            out, lse = torch_internals.flash_cpu(q, k, v, 0.0, False, attn_mask=bias, scale=a.scale)
            return token_major_copy(out), lse.contiguous()
    tiles = _Tiles(a)
    if tiles.are_one and q.device.type == "cpu":  # neither cut nor put together
        out, lse = flash_forward(q, k, v, tiles.bias(tiles.whole), a.scale, False)
        return token_major_copy(out), lse.contiguous()
    out, lse = fake(a)
    maps = [x.unflatten(2, tiles.grid) for x in (q, k, v, out, lse)]
    on_cpu = q.device.type == "cpu"
    for at, seen, patterns in tiles:
        tile_q, tile_k, tile_v = (x[box].flatten(2, -2) for x, box in zip(maps[:3], (at, seen, seen), strict=True))
        bias = tiles.bias(patterns)
        if on_cpu:
            tile_out, tile_lse = flash_forward(tile_q, tile_k, tile_v, bias, a.scale, False)
        else:
            tile_out, tile_lse = chunked_forward(tile_q, tile_k, tile_v, [bias], (), a.scale)
        for x, tile in zip(maps[3:], (tile_out, tile_lse), strict=True):
            box = x[at]
            box.copy_(tile.unflatten(2, box.shape[2 : 2 + len(tiles.grid)]))
    return out, lse


def backward(grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:
    """The tiles again; gradients of shared keys are summed in the accumulation dtype."""
    (grad_out, grad_lse), (out, lse) = grads, kept
    assert grad_out is not None
    q, k, v, rpb = a[:4]
    needs_rpb = needs[3]
    # Keys take part in several tiles: their gradients are summed in the accumulation dtype.
    dtype = _wide(q.dtype)
    totals = [token_major(x, *x.shape).to(dtype).zero_() for x in (q, k, v)]
    drpb = None if rpb is None else torch.zeros_like(rpb, dtype=dtype, memory_format=torch.contiguous_format)
    if q.numel() and v.numel():
        tiles = _Tiles(a)
        incoming = [grad_out, grad_lse, out, lse, q]
        by_query = [None if x is None else x.unflatten(2, tiles.grid) for x in incoming]
        by_key = [x.unflatten(2, tiles.grid) for x in (k, v)]
        results = [x.unflatten(2, tiles.grid) for x in totals]
        flash = q.device.type == "cpu" and not needs_rpb
        for at, seen, patterns in tiles:
            rows = [None if x is None else x[at].flatten(2, 1 + len(tiles.grid)) for x in by_query]
            cells = [x[seen].flatten(2, -2) for x in by_key]
            arguments: Any = (*rows, *cells)
            bias = tiles.bias(patterns)
            if flash:
                parts: Any = flash_backward(*arguments, bias=bias, scale=a.scale, causal=False)
            else:
                d_out, d_lse, tile_out, tile_lse, *cells = arguments
                shift = row_shift(d_out, d_lse, tile_out, dtype)
                parts = chunked_backward(d_out, shift, tile_lse, *cells, [bias], (), a.scale, needs_bias=needs_rpb)  # pyright: ignore[reportCallIssue]
                if needs_rpb and drpb is not None:
                    tiles.add_bias_gradient(patterns, parts.pop(), drpb)
            for total, grad, box in zip(results, parts[:3], (at, seen, seen), strict=True):
                target = total[box]
                target += grad.unflatten(2, target.shape[2:-1])
        if drpb is not None:
            tiles.flush(drpb)
    return [*totals, drpb]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Tiles:
    """Boxes of queries with the boxes of keys that they see, and the additive bias of each pair of boxes."""

    def __init__(self, a: Arguments) -> None:
        self.grid = tuple(a.grid)
        self.spans = _plan(*_rules(a))
        self.are_one = all(len(along) == 1 for along in self.spans) and max(a.dilation) == 1
        self.q, self.rpb, self.kernel_size = a.q, a.rpb, a.kernel_size
        self.biases: dict[tuple[Pattern, ...], Tensor] = {}
        self.gradients: dict[tuple[Pattern, ...], Tensor] = {}

    def __iter__(self) -> Iterator[tuple[tuple[slice, ...], tuple[slice, ...], tuple[Pattern, ...]]]:
        whole = slice(None)
        for box in itertools.product(*self.spans):
            queries, keys = tuple(s.queries for s in box), tuple(s.keys for s in box)
            yield (whole, whole, *queries), (whole, whole, *keys), tuple(s.pattern for s in box)

    @property
    def whole(self) -> tuple[Pattern, ...]:
        """What the only tile looks like, where :attr:`are_one`."""
        return tuple(span.pattern for (span,) in self.spans)

    def bias(self, patterns: tuple[Pattern, ...]) -> Tensor:
        """(1|B, 1|H, queries, keys): rpb, or 0, where a key is seen, −inf elsewhere."""
        if patterns in self.biases:
            return self.biases[patterns]
        hidden = _hidden(patterns, self.q.dtype, self.q.device)
        bias = hidden if self.rpb is None else self.rpb.flatten(2)[..., self._index(patterns)] + hidden
        if sum(kept.numel() for kept in self.biases.values()) + bias.numel() > KEPT_BIASES:
            self.biases.clear()
        self.biases[patterns] = bias
        return bias

    def _index(self, patterns: tuple[Pattern, ...]) -> Tensor:
        """(queries, keys) index into the flat rpb; keys out of sight get the nearest."""
        index = torch.zeros(1, 1, dtype=torch.int64, device=self.q.device)
        for pattern, size in zip(patterns, self.kernel_size, strict=True):
            query = torch.arange(len(pattern.first), device=self.q.device)[:, None] + pattern.lead
            offset = torch.arange(pattern.keys, device=self.q.device) - query + size - 1
            index = outer(index * (2 * size - 1), offset.clamp(0, 2 * size - 2), torch.add)
        return index

    def add_bias_gradient(self, patterns: tuple[Pattern, ...], dbias: Tensor, drpb: Tensor) -> None:
        """Tiles of equal shape share one sum; it is spread over rpb when they are done, or too many are open."""
        if patterns in self.gradients:
            self.gradients[patterns] += dbias
            return
        if sum(kept.numel() for kept in self.gradients.values()) + dbias.numel() > KEPT_BIASES:
            self.flush(drpb)
        self.gradients[patterns] = dbias

    def flush(self, drpb: Tensor) -> None:
        flat = drpb.flatten(2)
        for patterns, dbias in self.gradients.items():
            flat.index_add_(2, self._index(patterns).flatten(), dbias.flatten(2))
        self.gradients.clear()


_Rules = tuple[
    tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[bool, ...], str, int, int
]  # of :func:`_plan`


def _rules(a: Arguments) -> _Rules:
    q = a.q
    along = (tuple(a.grid), tuple(a.kernel_size), tuple(a.dilation), tuple(a.stride), tuple(a.is_causal))
    return *along, a.border, q.shape[0] * q.shape[1], q.shape[3] + a.v.shape[3]


@functools.lru_cache(maxsize=256)
def _plan(
    grid: tuple[int, ...],
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    stride: tuple[int, ...],
    is_causal: tuple[bool, ...],
    border: str,
    images: int,
    width: int,
) -> list[tuple[Span, ...]]:
    rules = zip(grid, kernel_size, dilation, stride, is_causal, strict=True)
    axes = tuple(Axis(*rule, border == "shifted") for rule in rules)
    return [spans(axis, extent) for axis, extent in zip(axes, extents(axes, images, width), strict=True)]


@functools.lru_cache(maxsize=32)
def _whole_bias(
    grid: tuple[int, ...],
    kernel_size: tuple[int, ...],
    dilation: tuple[int, ...],
    stride: tuple[int, ...],
    is_causal: tuple[bool, ...],
    border: str,
    images: int,
    width: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """(1, 1, N, N) of :func:`_hidden` where one tile holds the whole grid and is small, on a CPU; else None."""
    plan = _plan(grid, kernel_size, dilation, stride, is_causal, border, images, width)
    if max(dilation) > 1 or any(len(along) > 1 for along in plan) or math.prod(grid) ** 2 > SMALL_BIAS:
        return None
    return _new_hidden(tuple(span.pattern for (span,) in plan), dtype, torch.device("cpu"))


def _hidden(patterns: tuple[Pattern, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(1, 1, queries, keys): −inf where a key is out of sight, 0 elsewhere; small ones are kept between calls."""
    entries = math.prod(len(pattern.first) * pattern.keys for pattern in patterns)
    return (_small_hidden if entries <= SMALL_BIAS else _new_hidden)(patterns, dtype, device)


def _new_hidden(patterns: tuple[Pattern, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    visible = torch.ones(1, 1, dtype=torch.bool, device=device)
    for pattern in patterns:
        key = torch.arange(pattern.keys, device=device)
        first, last = (torch.tensor(x, device=device)[:, None] for x in (pattern.first, pattern.last))
        visible = outer(visible, (first <= key) & (key <= last), torch.logical_and)
    return torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, -math.inf)[None, None]


_small_hidden = functools.lru_cache(maxsize=32)(_new_hidden)


neighborhood_attention = NEIGHBORHOOD_ATTENTION.register("torch", forward, backward, exported=reference)
