"""Fused attention: tile choice, launches and registration; kernels in ``triton_forward`` and ``triton_backward``.

This file imports without Triton. Memory beyond the results: the log-sum-exp, δ (B, H, N) in the backward pass, and one
float32 buffer (B, H, N, n_a) for each axis table whose gradient is summed or added to.
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

from .reference import ATTENTION, Arguments, expand_axis_bias, fake, key_ranges
from .triton_config import Pass, choose_tile

LOG2E = math.log2(math.e)


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """One program for each head and tile of queries, online softmax over the keys."""
    from .triton_forward import forward_kernel

    out, lse = fake(a)
    if a.k.shape[2] == 0:
        return out.zero_(), lse.fill_(-math.inf)
    if out.numel() == 0:
        return out, lse
    problem = _Problem(a)
    tile = problem.tile("forward")
    launch(
        forward_kernel,
        problem.programs(tile),
        a.q.device,
        tile,
        *(*problem.arguments, out, lse, *out.stride()[:3]),
        **problem.constants(tile),
        **problem.masking(tile),
    )
    return out, lse


# Whole: three launches; a launch is the list of its arguments.
def backward(grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:
    """One pass by queries, one by keys, one for a bias of several images; scores are computed again."""
    from .triton_backward import bias_kernel, key_kernel, query_kernel

    (grad_out, grad_lse), (out, lse) = grads, kept
    assert grad_out is not None
    q, k, v, bias, scale = a.q, a.k, a.v, a.bias, a.scale
    need_q, need_k, need_v, need_bias, *need_tables = needs
    if q.numel() == 0 or k.numel() == 0:
        return [None if x is None else empty_gradient(x, i < 3).zero_() for i, x in enumerate((*a[:4], *a.axis_bias))]
    problem = _Problem(a)
    grad_out, out = unit_stride(grad_out), unit_stride(out)
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    delta = row_delta(grad_out, out, lse, grad_lse, problem.block_dv)
    incoming = (grad_out, lse, delta, *grad_out.stride()[:3])

    dq = empty_gradient(q, True) if need_q else None
    dbias = None
    whole = bias is not None and bias.shape == (batch, heads, queries, keys)
    if bias is not None and need_bias:
        # Causality and ranges skip tiles, which then must hold zeros.
        skips = whole and (a.is_cut or a.causal != "none")
        dbias = torch.zeros_like(bias).contiguous() if skips else empty_gradient(bias, False)
    table_buffers = problem.table_buffers(need_tables)
    if need_q or (need_bias and whole) or any(need_tables):
        tile = problem.tile("query")
        launch(
            query_kernel,
            problem.programs(tile),
            q.device,
            tile,
            *(*problem.arguments, *incoming, scale, problem.tables[0].shape[3] if len(problem.tables) > 1 else 1),
            *(dq, dbias if whole else None, table_buffers[-1] if table_buffers else None),
            *(table_buffers[0] if len(table_buffers) > 1 else None,),
            *(table_buffers[1] if len(table_buffers) > 2 else None,),
            *(*(dq.stride()[:3] if dq is not None else (0, 0, 0)),),
            **problem.constants(tile),
            **problem.masking(tile),
        )
    dk = empty_gradient(k, True) if need_k else None
    dv = empty_gradient(v, True) if need_v else None
    # Both accumulators of wide heads at once would not fit the registers: one pass for each.
    wide = max(problem.block_d, problem.block_dv) > 128
    for own_dk, own_dv in ((dk, None), (None, dv)) if wide else ((dk, dv),):
        if own_dk is None and own_dv is None:
            continue
        tile = problem.tile("key")
        tiles = problem.key_tiles(tile)
        launch(
            key_kernel,
            batch * k.shape[1] * tiles,
            q.device,
            tile,
            *(*problem.arguments, *incoming, scale, tiles, *problem.query_ranges(), own_dk, own_dv),
            *(*(own_dk.stride()[:3] if own_dk is not None else (0, 0, 0)),),
            *(*(own_dv.stride()[:3] if own_dv is not None else (0, 0, 0)),),
            **problem.constants(tile),
        )
    if dbias is not None and not whole:
        tile = problem.tile("bias")
        _, _, own_i, own_j = dbias.shape
        tiles = (batch, heads, math.ceil(queries / tile.rows), problem.key_tiles(tile))
        own = tuple(1 if size == 1 else count for size, count in zip(dbias.shape, tiles, strict=True))
        launch(
            bias_kernel,
            math.prod(own),
            q.device,
            tile,
            *(*problem.arguments, *incoming, *own[1:]),
            *(*(count // mine for count, mine in zip(tiles, own, strict=True)), dbias),
            **problem.constants(tile),
            SUM_N=own_i == 1,
            SUM_M=own_j == 1,
        )
    return [dq, dk, dv, dbias, *problem.table_gradients(table_buffers)]


class _Problem:
    """Arguments that every kernel takes, in the kernels' order."""

    def __init__(self, a: Arguments) -> None:
        q, k, v, bias, key_mask, _, _, self.given, scale, causal, _ = a
        self.q, self.k, self.v = unit_stride(q), unit_stride(k), unit_stride(v)
        self.bias, self.causal = bias, causal != "none" and not a.is_cut
        self.ranges = key_ranges(a) if a.is_cut else None
        # The kernels know three axes: all before the last two become one table, their outer sum.
        self.tables = [unit_stride(table) for table in self.given]
        if len(self.tables) > 3:
            self.tables[:-2] = [expand_axis_bias(self.tables[:-2]).contiguous()]
        self.block_d, self.block_dv = power_of_two(q.shape[3], 16), power_of_two(v.shape[3], 16)
        keys = k.shape[2]
        self.cells = self.tables[-1].shape[3] if self.tables else 1  # in a row of the grid
        self.grid_rows = keys // self.cells if self.tables else 1
        last, first, second = ([*self.tables[-1:], *self.tables[:-1]] + [None] * 3)[:3]
        mask = key_mask.view(torch.uint8) if key_mask is not None else None
        self.arguments = (
            self.q,
            self.k,
            self.v,
            bias,
            mask,
            last,
            first,
            second,
            *self.q.stride()[:3],
            *self.k.stride()[:3],
            *self.v.stride()[:3],
            *(broadcast_strides(bias) if bias is not None else (0,) * 4),
            *(broadcast_strides(mask)[:1] + mask.stride()[1:] if mask is not None else (0, 0)),
            *(
                s
                for table in (last, first, second)
                for s in (broadcast_strides(table)[:3] if table is not None else (0,) * 3)
            ),
            q.shape[1],
            q.shape[1] // k.shape[1],
            q.shape[2],
            0 if self.tables else keys,  # M of a grid is its cells, whose number is no reason for another compiled form
            self.cells,
            self.grid_rows,
            second.shape[3] if second is not None else 1,
            scale * LOG2E,
            keys - q.shape[2] if causal == "lower_right" else 0,
            *_with_stride(self.ranges),
        )

    def query_ranges(self) -> tuple[Any, ...]:
        """First query, and one behind the last, that may see each key (1|B, M), and their stride; the kernel's LOW."""
        if self.ranges is None:
            return None, None, 0
        first, end = (bound.contiguous() for bound in self.ranges)
        j = torch.arange(self.k.shape[2], device=first.device).expand(first.shape[0], -1).contiguous()
        return _with_stride((torch.searchsorted(end, j, right=True), torch.searchsorted(first, j, right=True)))

    def tile(self, kernel: Pass) -> Tile:
        dense, ranged = self.bias is not None, self.ranges is not None
        # Ranges take as many registers as one kind of bias, and more beside a dense one or in float32.
        most = ranged and (dense or self.q.dtype == torch.float32)
        load = "ranged" if most else ("plain", "bias", "both")[dense + bool(self.tables) + ranged]
        width = max(self.block_d, self.block_dv)
        return choose_tile(kernel, width, self.q.dtype, architecture(self.q.device), load)

    def programs(self, tile: Tile) -> int:
        batch, heads, queries, _ = self.q.shape
        return batch * heads * math.ceil(queries / tile.rows)

    def cells_per_tile(self, tile: Tile) -> int:
        """How many cells of one grid row a key tile spans: the widest that pads the grid ≤ 10 % more than the best.

        From 8 to 64: each width is a compiled kernel of its own.
        """
        if not self.tables:
            return tile.columns

        def padded(cells: int) -> int:
            rows = tile.columns // cells
            return math.ceil(self.cells / cells) * cells * math.ceil(self.grid_rows / rows) * rows

        choices = [cells for cells in (64, 32, 16, 8) if cells <= tile.columns]
        least = min(map(padded, choices))
        return next(cells for cells in choices if padded(cells) <= 1.1 * least)

    def key_tiles(self, tile: Tile) -> int:
        if not self.tables:
            return math.ceil(self.k.shape[2] / tile.columns)
        across = self.cells_per_tile(tile)
        return math.ceil(self.cells / across) * math.ceil(self.grid_rows / (tile.columns // across))

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
            "CAUSAL": self.causal,
            **product_options(self.q.dtype),
        }

    def masking(self, tile: Tile) -> dict[str, Any]:
        """Whether every tile holds keys alone that all queries may see, unless causality hides some."""
        # With tables the width of a tile follows the grid: one form of the kernel for each is enough.
        whole = self.ranges is None and not self.tables
        return {"EVEN": whole and self.key_tiles(tile) * tile.columns == self.k.shape[2]}

    def table_buffers(self, needs: Sequence[bool]) -> list[Tensor | None]:
        """Where the query pass leaves the gradient of each table of ``self.tables``, for every batch and head."""
        if len(needs) > 3:
            needs = [any(needs[:-2]), *needs[-2:]]
        batch, heads, queries, _ = self.q.shape
        buffers: list[Tensor | None] = []
        for position, (table, need) in enumerate(zip(self.tables, needs, strict=True)):
            shape = (batch, heads, queries, table.shape[3])
            if not need:
                buffers.append(None)
            elif position == len(self.tables) - 1:
                dtype = table.dtype if table.shape == shape else torch.float32
                buffers.append(table.new_empty(shape, dtype=dtype))
            else:
                buffers.append(table.new_zeros(shape, dtype=torch.float32))
        return buffers

    def table_gradients(self, buffers: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the tables as they were given, but for broadcast dimensions: split where folded into one."""
        if len(self.given) <= 3:
            return list(buffers)
        folded, sizes = buffers[0], [table.shape[3] for table in self.given[:-2]]
        parts: list[Tensor | None] = []
        for axis in range(len(sizes)):
            others = [3 + other for other in range(len(sizes)) if other != axis]
            parts.append(folded.unflatten(3, sizes).sum(others) if folded is not None else None)
        return [*parts, *buffers[1:]]


def _with_stride(ranges: tuple[Tensor, Tensor] | None) -> tuple[Any, ...]:
    """Both bounds for a kernel, and their stride from one image to the next: 0 where they are the same for all."""
    if ranges is None:
        return None, None, 0
    low, high = (bound.to(torch.int32).contiguous() for bound in ranges)
    return low, high, 0 if low.shape[0] == 1 else low.stride(0)


attention = ATTENTION.register("triton", forward, backward)


AOT_FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ragged mask": {"queries": 1000, "keys": 1001, "masked": True},
    "causal gqa": {"causal": "lower_right", "key_heads": 2},
    "bias over batch": {"bias": (1, 8, 1024, 4096)},
    "axes 50×84": {"axes": (50, 84)},
    "axes 16³": {"axes": (16, 16, 16), "queries": 4096},
    "bias axes 14×14": {"axes": (14, 14), "bias": (1, 8, 196, 196), "queries": 196},
    "packed": {"key_heads": 2, "causal": "lower_right", "sequences": 12},
    "window, mask, bias": {"window": (512, 0), "masked": True, "bias": (1, 8, 1024, 4096)},
    "window axes 50×84": {"axes": (50, 84), "window": (512, 512)},
}


def aot_cases(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Runs on meta tensors that reach every tile of the table and every form of the kernels."""
    usual = [
        *((torch.bfloat16, 32, form) for form in ("causal gqa", "bias over batch", "axes 16³")),
        *((torch.bfloat16, 64, form) for form in ("causal gqa", "ragged mask", "bias over batch", "axes 50×84")),
        *((torch.bfloat16, 128, form) for form in ("causal gqa", "axes 50×84", "bias axes 14×14")),
        *((torch.bfloat16, 256, form) for form in AOT_FORMS if form not in ("plain", "ragged mask", "axes 16³")),
        *((torch.float32, 64, form) for form in ("causal gqa", "bias over batch", "bias axes 14×14")),
        *((torch.float32, 128, form) for form in ("causal gqa", "bias over batch", "bias axes 14×14")),
        (torch.float16, 40, "bias axes 14×14"),
        *((torch.bfloat16, width, form) for width in (32, 128, 256) for form in ("packed", "window, mask, bias")),
        *((torch.bfloat16, width, "window axes 50×84") for width in (64, 128, 256)),
        (torch.float32, 64, "packed"),
        (torch.float32, 128, "packed"),
        (torch.float32, 64, "window axes 50×84"),
    ]
    few = [(torch.bfloat16, 64, "plain"), (torch.bfloat16, 32, "axes 50×84"), (torch.bfloat16, 64, "packed")]
    for dtype, width, form in few if quick else few + usual:
        label = f"{str(dtype).removeprefix('torch.')} {width} {form}"
        yield label, functools.partial(_aot_run, dtype, width, **AOT_FORMS[form])


def _aot_run(
    dtype: torch.dtype,
    width: int,
    queries: int = 1024,
    keys: int = 4096,
    key_heads: int = 8,
    bias: tuple[int, ...] | None = None,
    axes: tuple[int, ...] = (),
    masked: bool = False,
    causal: str = "none",
    sequences: int = 0,
    window: tuple[int, ...] = (),
) -> None:
    keys = math.prod(axes) if axes else keys
    batch, heads = 2, 8

    def meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q = meta(batch, queries, heads, width).transpose(1, 2)
    k, v = (meta(batch, keys, key_heads, width).transpose(1, 2) for _ in range(2))
    starts = torch.empty(1, sequences + 1, dtype=torch.int32, device="meta") if sequences else None
    a = Arguments(
        q,
        k,
        v,
        meta(*bias) if bias else None,
        torch.empty(batch, keys, dtype=torch.bool, device="meta") if masked else None,
        starts,
        starts,
        [meta(batch, heads, queries, size) for size in axes],
        width**-0.5,
        causal,
        window,
    )
    out, lse = forward(a)
    needs = [True, True, True, bias is not None, *[True] * len(axes)]
    backward((torch.empty_like(out), torch.empty_like(lse)), (out, lse), a, needs)
