"""Windows cell by cell: which key stands in which slot, and boxes of queries with the box of keys that they see.

Slots of a window are numbered row-major. Along one axis slot t of a shifted or causal window is the t-th key that the
query sees, so that the slots behind the last key of a causal window are empty; slot t of a truncated window is the
cell t − kernel_size // 2 steps away, so that slots outside the grid are empty. Three products over boxes are all that
scores, values and their gradients need.
"""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attn_core.checks import check_choice, check_flag, check_integer, check_tensor, fail, shape
from attn_core.ops.neighborhood_attention.windows import Axis, extents, outer, per_axis, spans

# Numbers in flight beyond the results: a share of the result, or 2¹⁵ where that is more.
SHARE, FEW = 12, 2**15
BORDERS = ("shifted", "truncated", "zero")


@dataclass(frozen=True)
class Windows:
    """The rules of all axes; hashable."""

    grid: tuple[int, ...]
    kernel_size: tuple[int, ...]
    dilation: tuple[int, ...]
    is_causal: tuple[bool, ...]
    border: str

    @property
    def slots(self) -> int:
        """Of a window."""
        return math.prod(self.kernel_size)

    def axes(self) -> list[Axis]:
        """The rule of each axis."""
        rules = zip(self.grid, self.kernel_size, self.dilation, self.is_causal, strict=True)
        return [Axis(*rule[:3], 1, rule[3], self.border == "shifted") for rule in rules]


def windows(
    grid: Sequence[int], kernel_size: Sequence[int], dilation: Sequence[int], is_causal: Sequence[bool], border: str
) -> Windows:
    """From the lists that library operators get."""
    return Windows(tuple(grid), tuple(kernel_size), tuple(dilation), tuple(is_causal), border)


def check_rules(
    operator: str, like: Tensor, kernel_size: Any, dilation: Any, is_causal: Any, border: Any
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[bool, ...]]:
    """The rules, one for each axis of ``like`` (B, H, *space, last).

    Raises:
        ValueError, TypeError: name the operator, the argument and the rule.
    """
    grid = like.shape[2:-1]
    check_choice(operator, "border", border, BORDERS)
    rules: list[tuple[Any, ...]] = []
    for argument, value in (("kernel_size", kernel_size), ("dilation", dilation), ("is_causal", is_causal)):
        each = per_axis(value, len(grid)) if not isinstance(value, str) else (value,) * len(grid)
        if len(each) != len(grid):
            fail(operator, argument, f"must be one value or one for each of the {len(grid)} axes", value)
        for item in each:
            if argument == "is_causal":
                check_flag(operator, argument, item)
            else:
                check_integer(operator, argument, item, 1)
        rules.append(each)
    kernel, dilated, causal = rules
    for axis, length in enumerate(grid):
        if border == "shifted" and kernel[axis] * dilated[axis] > length:
            raise ValueError(
                f"{operator}: kernel_size · dilation must not exceed the {length} cells of axis {axis} with "
                f"border='shifted', got kernel_size={kernel[axis]} and dilation={dilated[axis]}; "
                f"use kernel_size<={length // dilated[axis]}, or another border"
            )
    return kernel, dilated, causal


def check_grid(operator: str, argument: str, tensor: object) -> None:
    """``tensor`` is (B, H, *space, last) over a grid of 1 to 3 axes, each with at least one cell."""
    check_tensor(operator, argument, tensor)
    assert isinstance(tensor, Tensor)
    if tensor.ndim not in (4, 5, 6):
        raise ValueError(
            f"{operator}: {argument} must have 4, 5 or 6 dimensions (B H *space D), got shape {shape(tensor)}"
        )
    if min(tensor.shape[2:-1]) < 1:
        raise ValueError(f"{operator}: {argument} must have at least one cell along every axis, got {shape(tensor)}")


def all_slots(w: Windows) -> tuple[Tensor, Tensor, Tensor]:
    """For the reference: (N, S) key cells, whether the slot holds one, and the index into a flat relative bias."""
    key, index = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    held = torch.ones(1, 1, dtype=torch.bool)
    for axis in w.axes():
        i, t = torch.arange(axis.length)[:, None], torch.arange(axis.kernel)
        p, residue = i // axis.dilation, i % axis.dilation
        n = (axis.length - residue + axis.dilation - 1) // axis.dilation
        if axis.causal:
            cell = (p - axis.kernel + 1).clamp(min=0) + t
            seen = cell <= p
        elif axis.shifted:
            cell = torch.minimum((p - axis.kernel // 2).clamp(min=0), n - axis.kernel) + t
            seen = cell >= 0
        else:
            cell = p - axis.kernel // 2 + t
            seen = (cell >= 0) & (cell < n)
        place = (cell * axis.dilation + residue).clamp(0, axis.length - 1)
        offset = (cell - p + axis.kernel - 1).clamp(0, 2 * axis.kernel - 2)
        key = outer(key * axis.length, place, torch.add)
        held = outer(held, seen, torch.logical_and)
        index = outer(index * (2 * axis.kernel - 1), offset, torch.add)
    return key, held, index


@dataclass(frozen=True)
class Box:
    """Queries side by side and the keys they see.

    Attributes:
        key: (queries, S) column of each slot among the keys of the box; that of an empty slot is one behind the last.
        readable: the same, but a key of the box in empty slots.
        empty: (queries, S) slots without a key, or None if there is none.
        bias: (queries, S) index into a flat relative bias.
    """

    at: tuple[slice, ...]
    seen: tuple[slice, ...]
    queries: int
    keys: int
    key: Tensor
    readable: Tensor
    empty: Tensor | None
    bias: Tensor


@functools.lru_cache(maxsize=256)
def boxes(w: Windows, images: int, width: int, result: int, device: torch.device) -> tuple[Box, ...]:
    """All boxes of a grid; ``images`` (batch × heads), ``width`` and the size of the result choose theirs."""
    return tuple(_boxes(w, images, width, result, device))


def only_box(w: Windows, x: Tensor, result: int) -> Box | None:
    """The box of a grid that is one, for all heads and images at once; its cells are in order."""
    images, width = x.shape[0] * x.shape[1], x.shape[-1]
    if result == 0 or w.dilation != (1,) * len(w.dilation):
        return None
    first, *others = boxes(w, images, width, result, x.device)
    if others or images * in_flight(first.queries, first.keys, w.slots, width) > FEW:
        return None
    return first


def _boxes(w: Windows, images: int, width: int, result: int, device: torch.device) -> Iterator[Box]:
    axes = tuple(w.axes())
    sizes = _sizes(w, images, width, result)
    along = [spans(axis, extent) for axis, extent in zip(axes, sizes, strict=True)]
    whole = slice(None)
    for box in itertools.product(*along):
        tables = _slots(tuple(span.pattern for span in box), axes, device)
        yield Box(
            (whole, whole, *(span.queries for span in box)),
            (whole, whole, *(span.keys for span in box)),
            *(math.prod(len(s.pattern.first) for s in box), math.prod(s.pattern.keys for s in box)),
            *tables,
        )


def _sizes(w: Windows, images: int, width: int, result: int) -> tuple[int, ...]:
    """Queries of a box along each axis: as many as pay, and one head of one image must fit beside the result."""
    axes = tuple(w.axes())
    sizes = list(extents(axes, images, width))
    while max(sizes) > 1:
        keys = math.prod(min(a.cells(0), n + a.kernel - 1) for a, n in zip(axes, sizes, strict=True))
        if in_flight(math.prod(sizes), keys, w.slots, width) <= max(FEW, result // SHARE):
            break
        largest = sizes.index(max(sizes))
        sizes[largest] = (sizes[largest] + 1) // 2
    return tuple(sizes)


def in_flight(queries: int, keys: int, slots: int, width: int) -> int:
    """Numbers that a box of one head of one image takes: products, slots twice, rows and keys."""
    return queries * (keys + 2 * slots + width) + keys * width


@functools.lru_cache(maxsize=256)
def _slots(
    patterns: tuple[Any, ...], axes: tuple[Axis, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    key, bias = (torch.zeros(1, 1, dtype=torch.int64) for _ in range(2))
    held = torch.ones(1, 1, dtype=torch.bool)
    for pattern, axis in zip(patterns, axes, strict=True):
        first, last = torch.tensor(pattern.first)[:, None], torch.tensor(pattern.last)[:, None]
        query = torch.arange(len(pattern.first))[:, None] + pattern.lead
        start = first if axis.causal or axis.shifted else query - axis.kernel // 2
        cell = start + torch.arange(axis.kernel)
        key = outer(key * pattern.keys, cell.clamp(0, pattern.keys - 1), torch.add)
        held = outer(held, (first <= cell) & (cell <= last), torch.logical_and)
        offset = (cell - query + axis.kernel - 1).clamp(0, 2 * axis.kernel - 2)
        bias = outer(bias * (2 * axis.kernel - 1), offset, torch.add)
    keys = math.prod(pattern.keys for pattern in patterns)
    empty = None if bool(held.all()) else (~held).to(device)
    readable = key.to(device)
    return readable if empty is None else readable.masked_fill(empty, keys), readable, empty, bias.to(device)


def parts(batch: int, heads: int, each: int, result: int) -> Iterator[tuple[slice, slice]]:
    """Images and heads at a time, so that ``each`` numbers for one head of one image stay a share of the result."""
    fit = max(1, max(FEW, result // SHARE) // max(1, each))
    if fit >= heads:
        step = fit // heads
        for first in range(0, batch, step):
            yield slice(first, first + step), slice(None)
        return
    for image in range(batch):
        for first in range(0, heads, fit):
            yield slice(image, image + 1), slice(first, first + fit)


def dot(q: Tensor, k: Tensor, box: Box) -> Tensor:
    """Products (b, h, queries, S) of rows with the keys of their slots; empty slots hold anything finite."""
    dense = q @ k.transpose(-1, -2)
    return dense.gather(-1, box.readable.expand(*dense.shape[:2], -1, -1))


def spread(p: Tensor, box: Box) -> Tensor:
    """Slots (b, h, queries, S) as rows over the keys of the box; what stands in empty slots is left out."""
    batch, heads, queries, _ = p.shape
    if box.empty is None:
        return p.new_zeros(batch, heads, queries, box.keys).scatter_(-1, box.key.expand(p.shape), p)
    dense = p.new_zeros(batch, heads, queries, box.keys + 1)
    return dense.scatter_(-1, box.key.expand(p.shape), p)[..., : box.keys]


def rows(x: Tensor, place: tuple[slice, ...], part: tuple[slice, slice], dtype: torch.dtype) -> Tensor:
    """(b, h, cells, last) of one box, for some images and heads, in the accumulation dtype."""
    return x[place][part].flatten(2, -2).to(dtype)


def bias_of(box: Box, rpb: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(B|1, H, queries, S) of a relative bias (B|1, H, …)."""
    return None if rpb is None else rpb.flatten(2)[..., box.bias].to(dtype)


def scores_of(box: Box, q: Tensor, k: Tensor, empty: float, bias: Tensor | None) -> Tensor:
    """(b, h, queries, S) of the rows and keys of one box."""
    scores = dot(q, k, box)
    if bias is not None:
        scores += bias
    if box.empty is not None:
        scores.masked_fill_(box.empty, empty)
    return scores


def scores_into(
    out: Tensor, q: Tensor, k: Tensor, w: Windows, empty: float, rpb: Tensor | None, dtype: torch.dtype
) -> None:
    """out (B, H, *grid, S) = q·k of every slot + rpb; ``empty`` in slots without a key."""
    batch, heads = q.shape[:2]
    for box in boxes(w, batch * heads, q.shape[-1], out.numel(), q.device):
        bias = bias_of(box, rpb, dtype)
        each = in_flight(box.queries, box.keys, w.slots, q.shape[-1])
        for part in parts(batch, heads, each, out.numel()):
            own = None if bias is None else bias[part if bias.shape[0] > 1 else (slice(None), part[1])]
            scores = scores_of(box, rows(q, box.at, part, dtype), rows(k, box.seen, part, dtype), empty, own)
            target = out[box.at][part]
            target.copy_(scores.unflatten(2, target.shape[2:-1]))


def values_into(out: Tensor, p: Tensor, v: Tensor, w: Windows, dtype: torch.dtype) -> None:
    """out (B, H, *grid, D) = Σ over slots of p · v."""
    batch, heads = p.shape[:2]
    for box in boxes(w, batch * heads, v.shape[-1], out.numel(), p.device):
        each = in_flight(box.queries, box.keys, w.slots, v.shape[-1])
        for part in parts(batch, heads, each, out.numel()):
            sums = spread(rows(p, box.at, part, dtype), box) @ rows(v, box.seen, part, dtype)
            target = out[box.at][part]
            target.copy_(sums.unflatten(2, target.shape[2:-1]))


def add_to_keys(total: Tensor, p: Tensor, q: Tensor, w: Windows) -> None:
    """total (B, H, *grid, D) += Σ of p·q over the queries and slots that hold the key: the transpose of both."""
    batch, heads = q.shape[:2]
    for box in boxes(w, batch * heads, q.shape[-1], total.numel(), q.device):
        each = in_flight(box.queries, box.keys, w.slots, q.shape[-1])
        for part in parts(batch, heads, each, total.numel()):
            dense = spread(rows(p, box.at, part, total.dtype), box)
            target = total[box.seen][part]
            sums = dense.transpose(-1, -2) @ rows(q, box.at, part, total.dtype)
            target += sums.unflatten(2, target.shape[2:-1])


def add_to_bias(total: Tensor, p: Tensor, w: Windows) -> None:
    """total (B|1, H, R) += Σ of p over images and queries, by offset."""
    batch, heads = p.shape[:2]
    for box in boxes(w, batch * heads, 1, p.numel(), p.device):
        each = 2 * box.queries * w.slots
        for part in parts(batch, heads, each, p.numel()):
            slots = rows(p, box.at, part, total.dtype)
            if box.empty is not None:
                slots = slots.masked_fill(box.empty, 0.0)
            target = total[part if total.shape[0] > 1 else (slice(None), part[1])]
            if total.shape[0] == 1:
                slots = slots.sum(0, keepdim=True)
            target.index_add_(2, box.bias.flatten(), slots.flatten(2))
