"""Fused grouped attention: token lists, launches and registration; kernels in ``triton_forward``, ``triton_backward``.

This file imports without Triton. Memory beyond the results: the token list, and in the backward pass three float32
tensors (B, H, G, N), a fourth with weights or gates. The gradient of a bias comes from the torch backend, in chunks.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

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

from . import torch_backend
from .reference import GROUP_ATTENTION, Arguments, fake
from .triton_config import Pass, choose_tile

LOG2E = math.log2(math.e)
LISTING = Tile(0, 0, 4, 1)  # of the kernels that make lists and shares


@dataclass(frozen=True)
class KeyList:
    """Tokens sorted by group, each group from a tile of its own on."""

    token: Tensor  # (b, tiles·BN) int32, −1 in holes
    first: Tensor  # (b, G + 1) int32: first tile of each group, and the end of the last
    tile_group: Tensor  # (b, tiles) int32: group of each tile, G in unused ones
    tiles: int


class Sorted:
    """The keys in the order of their groups; lists for tiles of any size are made from it, each once.

    Lengths depend on shapes alone, so that nothing waits for the GPU.
    """

    def __init__(self, group: Tensor, key_mask: Tensor | None, groups: int) -> None:
        from .triton_keys import name_kernel

        self.groups = groups
        self.batch = max(group.shape[0], 1 if key_mask is None else key_mask.shape[0])
        self.keys = group.shape[1]
        if key_mask is not None:
            named = group.new_empty(self.batch, self.keys, dtype=torch.int32)
            launch(
                name_kernel,
                self.batch * math.ceil(self.keys / 1024),
                group.device,
                LISTING,
                *(group, key_mask, named, *broadcast_strides(group), *broadcast_strides(key_mask), self.keys, groups),
                BM=1024,
            )
            group = named
        self.order, self.starts = inverted(group, groups)
        self._lists: dict[int, KeyList] = {}

    def tiles(self, columns: int) -> KeyList:
        """The list for tiles of ``columns`` keys."""
        from .triton_keys import tile_kernel

        if columns in self._lists:
            return self._lists[columns]
        count = math.ceil(self.keys / columns) + self.groups
        sizes = ((self.batch, count * columns), (self.batch, self.groups + 1), (self.batch, count))
        token, first, tile_group = (self.starts.new_empty(size) for size in sizes)
        launch(
            tile_kernel,
            self.batch * count,
            token.device,
            LISTING,
            *(self.order, self.starts, token, first, tile_group, self.keys, self.groups, count),
            BN=columns,
            BLOCK_G=power_of_two(self.groups + 1),
        )
        self._lists[columns] = KeyList(token, first, tile_group, count)
        return self._lists[columns]


class _Problem:
    """Arguments that every kernel takes, in the kernels' order."""

    def __init__(self, a: Arguments) -> None:
        q, k, v = a.q, a.k, a.v
        self.q, self.k, self.v = unit_stride(q), unit_stride(k), unit_stride(v)
        self.groups = a.num_groups
        self.bias, self.causal = a.bias, a.causal
        self.laden = a.bias is not None or a.factor is not None
        self.block_d, self.block_dv = power_of_two(q.shape[3], 16), power_of_two(v.shape[3], 16)
        self.scale2 = a.scale * LOG2E
        self.sorted = Sorted(a.group, a.key_mask, a.num_groups)

    def tile(self, kernel: Pass) -> Tile:
        width = max(self.block_d, self.block_dv)
        return choose_tile(kernel, width, self.q.dtype, architecture(self.q.device), self.laden)

    def arguments(self, tile: Tile, per_tile: bool, factor: tuple[Tensor | None, ...] = ()) -> tuple[Any, ...]:
        """Operands, their strides, sizes; ``factor`` = (weight or gate,) for the forward kernel."""
        keys = self.sorted.tiles(tile.columns)
        second = keys.tile_group if per_tile else keys.first
        strides = [broadcast_strides(x)[:1] for x in (keys.token, second)]
        strides += [broadcast_strides(x) if x is not None else (0,) * 4 for x in (*factor, self.bias)]
        offset = self.k.shape[2] - self.q.shape[2] if self.causal == "lower_right" else 0
        return (
            *(self.q, self.k, self.v, keys.token, second, *factor, self.bias),
            *(stride for x in (self.q, self.k, self.v) for stride in x.stride()[:3]),
            *(stride for own in strides for stride in own),
            *(self.q.shape[1], self.q.shape[1] // self.k.shape[1], self.q.shape[2], self.groups),
            *(self.scale2, offset),
        )

    def programs(self, tile: Tile) -> int:
        batch, heads, queries, _ = self.q.shape
        return batch * heads * math.ceil(queries / tile.rows)

    def constants(self, tile: Tile) -> dict[str, Any]:
        return {
            "D": self.q.shape[3],
            "DV": self.v.shape[3],
            "BLOCK_D": self.block_d,
            "BLOCK_DV": self.block_dv,
            "BM": tile.rows,
            "BN": tile.columns,
            "CAUSAL": self.causal != "none",
            **product_options(self.q.dtype),
        }


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """One program for each head and tile of queries, one running sum for each group."""
    from .triton_forward import forward_kernel

    out, group_lse = fake(a)
    if a.k.shape[2] == 0:
        return out.zero_(), group_lse.fill_(-math.inf)
    if group_lse.numel() == 0:
        return out, group_lse
    problem = _Problem(a)
    tile = problem.tile("forward")
    launch(
        forward_kernel,
        problem.programs(tile),
        a.q.device,
        tile,
        *(*problem.arguments(tile, False, (a.factor,)), out, group_lse, *out.stride()[:3]),
        **problem.constants(tile),
        WEIGHT=a.mode == "weight",
    )
    return out, group_lse


# Whole: two launches; a launch is the list of its arguments.
def backward(grads: Grads, kept: tuple[Tensor, ...], a: Arguments, needs: Sequence[bool]) -> list[Tensor | None]:
    """One pass by queries, one by keys; scores are computed again."""
    from .triton_backward import key_kernel, query_kernel

    (grad_out, grad_lse), (out, group_lse) = grads, kept
    assert grad_out is not None
    q, k, v, factor, scale, mode = *a[:3], a.factor, a.scale, a.mode
    need_q, need_k, need_v, need_factor, need_bias = needs
    if q.numel() == 0 or k.shape[2] == 0:
        operands = (q, k, v, factor, a.bias)
        return [None if x is None else empty_gradient(x, i < 3).zero_() for i, x in enumerate(operands)]
    problem = _Problem(a)
    grad_out = unit_stride(grad_out)
    share = None  # Σ_g W_g o_g is out, so with masses as gates the shares themselves are not needed
    if mode != "mass":
        mass = group_lse.transpose(2, 3).contiguous()
        share = torch.empty_like(mass)
        tile = problem.tile("share")
        launch(
            query_kernel,
            problem.programs(tile),
            q.device,
            tile,
            *(*problem.arguments(tile, False), grad_out, mass, None, None, *grad_out.stride()[:3], scale, share, None),
            *(0, 0, 0),
            **problem.constants(tile),
        )
    rest, dgate = _shares(a, grad_out, grad_lse, out, group_lse, share)
    rows = (grad_out, *rest, *grad_out.stride()[:3], scale)

    dq = empty_gradient(q, True) if need_q else None
    if dq is not None:
        tile = problem.tile("query")
        launch(
            query_kernel,
            problem.programs(tile),
            q.device,
            tile,
            *(*problem.arguments(tile, False), *rows, None, dq, *dq.stride()[:3]),
            **problem.constants(tile),
        )
    # Keys in no group are in no tile either.
    dk = empty_gradient(k, True).zero_() if need_k else None
    dv = empty_gradient(v, True).zero_() if need_v else None
    # Both accumulators of wide heads at once would not fit the registers: one pass for each.
    wide = max(problem.block_d, problem.block_dv) > 128
    for own_dk, own_dv in ((dk, None), (None, dv)) if wide else ((dk, dv),):
        if own_dk is None and own_dv is None:
            continue
        tile = problem.tile("key")
        tiles = problem.sorted.tiles(tile.columns).tiles
        launch(
            key_kernel,
            q.shape[0] * k.shape[1] * tiles,
            q.device,
            tile,
            *(*problem.arguments(tile, True), *rows, tiles, own_dk, own_dv),
            *(*(own_dk.stride()[:3] if own_dk is not None else (0, 0, 0)),),
            *(*(own_dv.stride()[:3] if own_dv is not None else (0, 0, 0)),),
            **problem.constants(tile),
        )
    dfactor = dbias = None
    if need_factor and share is not None:
        dfactor = share.transpose(2, 3) if mode == "weight" else dgate
    if need_bias:
        *_, dbias = torch_backend.backward(grads, kept, a, [False, False, False, False, True])
    return [dq, dk, dv, dfactor, dbias]


def _shares(
    a: Arguments, grad_out: Tensor, grad_lse: Tensor | None, out: Tensor, group_lse: Tensor, share: Tensor | None
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor | None]:
    """What both passes read, (B, H, G, N) float32: masses, weights and the rest E; and the gradient of gates."""
    from .triton_backward import shares_kernel

    batch, heads, queries, groups = group_lse.shape
    mass, weight, extra = (torch.empty_like(group_lse.transpose(2, 3), memory_format=torch.contiguous_format)
                           for _ in range(3))  # fmt: skip
    dgate = torch.empty_like(group_lse, memory_format=torch.contiguous_format) if a.mode == "gate" else None
    block_g = power_of_two(groups)
    rows = min(64, max(1, 2048 // block_g))
    out, group_lse = unit_stride(out), group_lse.contiguous()
    launch(
        shares_kernel,
        batch * heads * math.ceil(queries / rows),
        out.device,
        LISTING,
        *(group_lse, a.factor, out, grad_out, share, grad_lse, mass, weight, extra, dgate),
        *(broadcast_strides(a.factor) if a.factor is not None else (0,) * 4),
        *(stride for x in (out, grad_out) for stride in x.stride()[:3]),
        *(grad_lse.stride() if grad_lse is not None else (0,) * 4),
        *(heads, queries, groups),
        DV=out.shape[3],
        BLOCK_DV=power_of_two(out.shape[3], 16),
        BM=rows,
        BLOCK_G=block_g,
        WEIGHT_MODE=a.mode == "weight",
    )
    return (mass, weight, extra), dgate


group_attention = GROUP_ATTENTION.register("triton", forward, backward)


AOT_FORMS: dict[str, dict[str, Any]] = {
    "masses causal gqa": {"causal": "upper_left", "key_heads": 2},
    "weights with bias": {"mode": "weight", "bias": (1, 1, 2048, 2048)},
    "gates causal": {"mode": "gate", "causal": "upper_left", "groups": 32},
}


def aot_cases(quick: bool) -> Iterator[tuple[str, Callable[[], None]]]:
    """Runs on meta tensors that reach every tile of the table and every form of the kernels."""
    usual = [
        *((torch.bfloat16, width, form) for width in (32, 64, 128, 256) for form in AOT_FORMS),
        *((torch.float32, width, form) for width in (64, 128) for form in ("weights with bias", "gates causal")),
        (torch.float16, 40, "weights with bias"),
    ]
    few = [(torch.bfloat16, 128, "masses causal gqa"), (torch.bfloat16, 64, "gates causal")]
    for dtype, width, form in few if quick else usual:
        label = f"{str(dtype).removeprefix('torch.')} {width} {form}"
        yield label, functools.partial(_aot_run, dtype, width, **AOT_FORMS[form])


def _aot_run(
    dtype: torch.dtype,
    width: int,
    tokens: int = 2048,
    key_heads: int = 8,
    groups: int = 4,
    mode: str = "mass",
    bias: tuple[int, ...] | None = None,
    causal: str = "none",
) -> None:
    batch, heads = 2, 8

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q = meta(batch, tokens, heads, width).transpose(1, 2)
    k, v = (meta(batch, tokens, key_heads, width).transpose(1, 2) for _ in range(2))
    factor = None if mode == "mass" else meta(batch, heads, tokens, groups, dtype=torch.float32)
    a = Arguments(
        q,
        k,
        v,
        meta(1, tokens, dtype=torch.int64),
        factor,
        meta(*bias) if bias else None,
        None,
        groups,
        width**-0.5,
        causal,
        mode,
    )
    out, group_lse = forward(a)
    needs = [True, True, True, factor is not None, False]
    backward((torch.empty_like(out), torch.empty_like(group_lse)), (out, group_lse), a, needs)
