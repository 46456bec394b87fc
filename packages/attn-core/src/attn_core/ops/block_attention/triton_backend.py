"""Fused block attention: tile choice, launches, registration; kernels in ``triton_forward`` and ``triton_backward``.

This file imports without Triton. Memory beyond the results: the indices as int32, in the backward pass the table's
inverse (its size again), and where key blocks may overlap a float32 buffer of one row per key slot for dK and for dV.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from attn_core.kernels.delta import row_delta
from attn_core.kernels.inverse import inverted
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
from attn_core.ops.attention.reference import expand_axis_bias

from .reference import BLOCK_ATTENTION, Arguments, fake
from .triton_config import Pass, choose_tile

LOG2E = math.log2(math.e)
# With several axes the gradients of the tables are held in registers, a power of two of columns each.
MAX_AXES = 3


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """One program for each head, block and tile of its queries."""
    from .triton_forward import forward_kernel

    out, lse = fake(a)
    # Programs write where their slots point; what no slot points to keeps these values.
    out.zero_()
    lse.fill_(-math.inf)
    problem = _Problem(a)
    if problem.empty or out.numel() == 0:
        return out, lse
    tile = problem.tile("forward")
    launch(
        forward_kernel,
        problem.programs(tile),
        a.q.device,
        tile,
        *(*problem.arguments, out, lse, *out.stride()[:3]),
        **problem.constants(tile),
    )
    return out, lse


def backward(grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:
    """One pass by blocks of queries, one by blocks of keys over the reversed table."""
    (grad_out, grad_lse), (out, lse) = grads, kept
    assert grad_out is not None
    problem = _Problem(a)
    if problem.empty or out.numel() == 0:
        operands = (*a[:3], a.kv_weight, *a.axis_bias)
        return [None if x is None else empty_gradient(x, i < 3).zero_() for i, x in enumerate(operands)]
    grad_out, out = unit_stride(grad_out), unit_stride(out)
    delta = row_delta(grad_out, out, lse, grad_lse, problem.block_dv)
    incoming = (grad_out, lse, delta, *grad_out.stride()[:3], a.scale)
    need_q, need_k, need_v, need_weight, *need_tables = needs
    dq, dweight, dtables = _query_pass(problem, incoming, need_q, need_weight, need_tables)
    dk, dv = _key_pass(problem, incoming, need_k, need_v)
    return [dq, dk, dv, dweight, *dtables]


# Whole: one launch, its buffers before it and their sums after it.
def _query_pass(
    problem: "_Problem",
    incoming: tuple[Any, ...],
    need_q: bool,
    need_weight: bool,
    need_tables: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
    """Gradients of q, kv_weight and the tables."""
    from .triton_backward import query_kernel

    if not (need_q or need_weight or any(need_tables)):
        return None, None, [None] * len(need_tables)
    q, weight = problem.q, problem.weight
    batch, heads, queries, width = q.shape
    results = problem.results
    if not need_q:
        dq = None
    elif problem.per_row:
        dq = q.new_empty(batch, heads, results, width, dtype=torch.float32)
    else:
        dq = empty_gradient(q, True).zero_()
    tile = problem.tile("query")
    shares = None
    if need_weight and weight is not None:
        row_tiles = math.ceil(problem.q_index.shape[3] / tile.rows)
        column_tiles = math.ceil(problem.kv_index.shape[3] / problem.cells_per_tile(tile))
        blocks, slots = weight.shape[2:]
        shares = q.new_empty(batch, heads, blocks, row_tiles, column_tiles, slots, dtype=torch.float32)
    folded_needs = [any(need_tables[:-2]), *need_tables[-2:]] if len(need_tables) > MAX_AXES else need_tables
    buffers: list[Tensor | None] = [
        (q.new_empty if problem.per_row else q.new_zeros)(batch, heads, results, t.shape[3], dtype=torch.float32)
        if need
        else None
        for t, need in zip(problem.tables, folded_needs, strict=True)
    ]
    padded = [power_of_two(t.shape[3], 16) for t in problem.tables] + [16] * MAX_AXES
    nothing: list[Tensor | None] = [None] * MAX_AXES
    work = [(dq, shares, (buffers + nothing)[:MAX_AXES])]
    if any(need_tables) and (problem.width > 64 or q.dtype == torch.float32):
        # Registers hold either dQ or the tables' gradients.
        work = [(dq, shares, nothing), (None, None, work[0][2])]
    for own_dq, own_shares, own_tables in work:
        if own_dq is None and own_shares is None and not any(x is not None for x in own_tables):
            continue
        launch(
            query_kernel,
            problem.programs(tile),
            q.device,
            tile,
            *(*problem.arguments, *incoming, own_dq, own_shares, *own_tables),
            *(*(own_dq.stride()[:3] if own_dq is not None else (0, 0, 0)),),
            *(problem.tables[0].shape[3] if problem.tables else 1,),
            **problem.constants(tile),
            N0=padded[0],
            N1=padded[1],
            N2=padded[2],
        )
    if problem.per_row:
        order, start = inverted(problem.q_index.flatten(2), queries)
        dq = _sum_of_slots(dq, order, start, empty_gradient(q, True)) if dq is not None else None
        buffers = [
            _sum_of_slots(x, order, start, x.new_empty(batch, heads, queries, x.shape[3])) if x is not None else None
            for x in buffers
        ]
    dweight = None if shares is None else shares.sum((3, 4))
    if len(need_tables) > MAX_AXES:
        folded, sizes = buffers[0], [t.shape[3] for t in problem.given[:-2]]
        others = [[3 + other for other in range(len(sizes)) if other != axis] for axis in range(len(sizes))]
        parts = [folded.unflatten(3, sizes).sum(dims) if folded is not None else None for dims in others]
        buffers = [*parts, *buffers[1:]]
    return dq, dweight, buffers


def _key_pass(
    problem: "_Problem", incoming: tuple[Any, ...], need_k: bool, need_v: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of k and v."""
    from .triton_backward import key_kernel

    if not (need_k or need_v):
        return None, None
    k, v, index = problem.k, problem.v, problem.kv_index
    batch, heads, tokens, _ = k.shape
    blocks, slots = index.shape[2:]
    if problem.table is None:
        order = start = None
        inverse_strides = (0, 0, 0, 0)
    else:
        order, start = inverted(problem.table.flatten(2), blocks)
        inverse_strides = (*broadcast_strides(order)[:2], *broadcast_strides(start)[:2])
    operands = [x if need else None for x, need in ((k, need_k), (v, need_v))]
    if problem.disjoint:
        gradients = [empty_gradient(x, True) if x is not None else None for x in operands]
        torch._foreach_zero_([x for x in gradients if x is not None])  # pyright: ignore[reportPrivateImportUsage]  one launch
    else:
        gradients = [
            x.new_empty(batch, heads, blocks * slots, x.shape[3], dtype=torch.float32) if x is not None else None
            for x in operands
        ]
    dk, dv = gradients
    # Both accumulators of wide heads at once would not fit the registers: one pass for each.
    wide = problem.width > 128
    for own_dk, own_dv in ((dk, None), (None, dv)) if wide else ((dk, dv),):
        if own_dk is None and own_dv is None:
            continue
        tile = problem.tile("key")
        launch(
            key_kernel,
            batch * heads * blocks * math.ceil(slots / tile.columns),
            k.device,
            tile,
            *(*problem.arguments, *incoming, order, start, *inverse_strides, blocks, own_dk, own_dv),
            *(*(own_dk.stride()[:3] if own_dk is not None else (0, 0, 0)),),
            *(*(own_dv.stride()[:3] if own_dv is not None else (0, 0, 0)),),
            **{name: value for name, value in problem.constants(tile).items() if name != "BX"},
            BI=min(tile.rows, power_of_two(problem.q_index.shape[3])),
            DISJOINT=problem.disjoint,
        )
    if not problem.disjoint:
        order, start = inverted(index.flatten(2), tokens)
        dk, dv = (
            _sum_of_slots(shares, order, start, empty_gradient(x, True))
            if shares is not None and x is not None
            else None
            for shares, x in zip(gradients, operands, strict=True)
        )
    return dk, dv


def _sum_of_slots(shares: Tensor, order: Tensor, start: Tensor, out: Tensor) -> Tensor:
    """Fill ``out`` (B, H, tokens, n) with the sums of each token's rows of ``shares`` (B, H, slots, n)."""
    from .triton_backward import reduce_kernel

    batch, heads, slots, width = shares.shape
    block = power_of_two(width)
    tile = Tile(max(1, 2048 // block), 0, 4, 1)
    launch(
        reduce_kernel,
        batch * heads * math.ceil(out.shape[2] / tile.rows),
        shares.device,
        tile,
        *(shares, order, start, out, *broadcast_strides(order)[:2], *broadcast_strides(start)[:2]),
        *(*out.stride()[:3], heads, out.shape[2], slots),
        WIDTH=width,
        BLOCK=block,
        BM=tile.rows,
    )
    return out


class _Problem:
    """Arguments that every kernel takes, in the kernels' order."""

    def __init__(self, a: Arguments) -> None:
        q, k, v, q_index, kv_index, table, kv_weight, q_pos, k_pos, self.given, causal, self_logit, scale, per_row = a
        # One list for queries and keys: since no query stands in two blocks, no key does.
        self.disjoint = not per_row and _same_memory(q_index, kv_index)
        self.q, self.k, self.v = unit_stride(q), unit_stride(k), unit_stride(v)
        self.q_index, self.kv_index = _compact(q_index), _compact(kv_index)
        self.table = _compact(table) if table is not None else None
        self.weight = kv_weight.contiguous() if kv_weight is not None else None
        self.causal, self.self_logit, self.per_row = causal, self_logit, per_row
        self.tables = [unit_stride(x) for x in self.given]
        if len(self.tables) > MAX_AXES:  # all before the last two become one table, their outer sum
            self.tables[:-2] = [expand_axis_bias(self.tables[:-2]).contiguous()]
        self.block_d, self.block_dv = power_of_two(q.shape[3], 16), power_of_two(v.shape[3], 16)
        self.width = max(self.block_d, self.block_dv)
        blocks, queries_per_block = q_index.shape[2:]
        keys_per_block = kv_index.shape[3]
        self.slots = table.shape[3] if table is not None else 1
        self.results = a.results
        self.empty = 0 in (q.numel(), k.numel(), self.q_index.numel(), self.kv_index.numel(), self.slots)
        positions = [_compact(x) if x is not None else None for x in (q_pos, k_pos)]
        tables = (self.tables + [None] * MAX_AXES)[:MAX_AXES]
        sizes = [x.shape[3] if x is not None else 1 for x in tables]
        indices = (self.q_index, self.kv_index, self.table, self.weight)
        self.arguments = (
            self.q,
            self.k,
            self.v,
            *indices,
            *positions,
            *tables,
            *self.q.stride()[:3],
            *self.k.stride()[:3],
            *self.v.stride()[:3],
            *(stride for x in indices for stride in (broadcast_strides(x)[:2] if x is not None else (0, 0))),
            *(broadcast_strides(x)[0] if x is not None else 0 for x in positions),
            *(stride for x in tables for stride in (broadcast_strides(x)[:3] if x is not None else (0, 0, 0))),
            q.shape[1],
            q.shape[1] // k.shape[1],
            blocks,
            queries_per_block,
            keys_per_block,
            self.slots,
            *sizes[1:],
            self.results,
            scale * LOG2E,
            self_logit * LOG2E if self_logit is not None else 0.0,
        )

    def tile(self, kernel: Pass) -> Tile:
        queries, keys = self.q_index.shape[3], self.kv_index.shape[3]
        # A tile packs the keys of several table slots, and in the key pass the queries of several blocks.
        if kernel == "key":
            queries *= self.slots
        else:
            keys *= self.slots
        arch = architecture(self.q.device)
        return choose_tile(kernel, self.width, self.q.dtype, arch, not self.tables, queries, keys)

    def programs(self, tile: Tile) -> int:
        batch, heads = self.q.shape[:2]
        blocks, queries = self.q_index.shape[2:]
        return batch * heads * blocks * math.ceil(queries / tile.rows)

    def cells_per_tile(self, tile: Tile) -> int:
        """How many slots of one key block a tile spans: the widest that pads ≤ 10 % more than the best."""
        keys = self.kv_index.shape[3]

        def padded(cells: int) -> int:
            slots = tile.columns // cells
            return math.ceil(keys / cells) * cells * math.ceil(self.slots / slots) * slots

        choices = [tile.columns >> shift for shift in range(tile.columns.bit_length())]
        least = min(map(padded, choices))
        return next(cells for cells in choices if padded(cells) <= 1.1 * least)

    def constants(self, tile: Tile) -> dict[str, Any]:
        return {
            "D": self.q.shape[3],
            "DV": self.v.shape[3],
            "BLOCK_D": self.block_d,
            "BLOCK_DV": self.block_dv,
            "BM": tile.rows,
            "BN": tile.columns,
            "BX": self.cells_per_tile(tile),
            "AXES": len(self.tables),
            "IDENTITY": self.table is None,
            "PER_ROW": self.per_row,
            "CAUSAL": self.causal,
            "SELF": self.self_logit is not None,
            **product_options(self.q.dtype),
        }


def _compact(index: Tensor) -> Tensor:
    return index.to(torch.int32).contiguous()


def _same_memory(a: Tensor, b: Tensor) -> bool:
    if a is b:
        return True
    if a.device.type == "meta":
        return False
    return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)


block_attention = BLOCK_ATTENTION.register("triton", forward, backward)


AOT_FORMS: dict[str, dict[str, Any]] = {
    "biformer 49×64 top-1": {"blocks": 49, "queries": 64, "topk": 1},
    "biformer 49×16 top-4": {"blocks": 49, "queries": 16, "topk": 4},
    "biformer 49×4 top-16": {"blocks": 49, "queries": 4, "topk": 16},
    "soft 49×64 top-4": {"blocks": 49, "queries": 64, "topk": 4, "weighted": True},
    "windows 49": {"blocks": 64, "queries": 49},
    "halo 8+3": {"blocks": 64, "queries": 64, "axes": (14, 14), "overlap": True},
    "clusters": {"blocks": 16, "queries": 128, "axes": (128,), "causal": True, "self_logit": -5e4, "per_row": True},
}


def aot_cases(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Runs on meta tensors that reach every tile of the table and every form of the kernels."""
    usual = [
        *((torch.bfloat16, 32, form) for form in AOT_FORMS),
        *((torch.bfloat16, 64, form) for form in ("soft 49×64 top-4", "biformer 49×4 top-16", "halo 8+3")),
        *((torch.bfloat16, width, form) for width in (128, 256) for form in ("soft 49×64 top-4", "halo 8+3")),
        *((torch.float32, width, form) for width in (64, 128) for form in ("soft 49×64 top-4", "halo 8+3")),
    ]
    few = [(torch.bfloat16, 32, "biformer 49×16 top-4"), (torch.float32, 64, "soft 49×64 top-4")]
    for dtype, width, form in few if quick else usual:
        label = f"{str(dtype).removeprefix('torch.')} {width} {form}"
        yield label, functools.partial(_aot_run, dtype, width, **AOT_FORMS[form])


def _aot_run(
    dtype: torch.dtype,
    width: int,
    blocks: int,
    queries: int,
    topk: int = 0,
    axes: tuple[int, ...] = (),
    weighted: bool = False,
    overlap: bool = False,
    causal: bool = False,
    self_logit: float | None = None,
    per_row: bool = False,
) -> None:
    batch, heads, tokens = 2, 4, blocks * queries

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, k, v = (meta(batch, tokens, heads, width).transpose(1, 2) for _ in range(3))
    q_index = meta(1, 1, blocks, queries, dtype=torch.int32)
    keys = math.prod(axes) if axes else queries
    kv_index = meta(1, 1, blocks, keys, dtype=torch.int32) if overlap or per_row else q_index
    table = meta(batch, 1, blocks, topk, dtype=torch.int64) if topk else None
    weight = meta(batch, 1, blocks, topk) if weighted else None
    tables = [meta(batch, heads, tokens, size) for size in axes]
    a = Arguments(
        q, k, v, q_index, kv_index, table, weight, None, None, tables, causal, self_logit, width**-0.5, per_row
    )  # fmt: skip
    out, lse = forward(a)
    needs = [True, True, True, weighted, *[True] * len(axes)]
    backward((torch.empty_like(out), torch.empty_like(lse)), (out, lse), a, needs)
