"""Benchmark of :func:`attn_core.neighborhood_attention`: NAT and DiNAT stages, a sequence, a volume."""

import importlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core import neighborhood_attention
from attn_core.dispatch import Backend
from attn_core.ops.neighborhood_attention.windows import Axis, outer

from .case import BenchCase, Call, Inputs, Provider, UnavailableError, backends

LENGTHS = (512, 1024, 2048, 4096)


def cases(device: str, quick: bool) -> list[BenchCase]:
    """NAT and DiNAT at published sizes, a volume, and a causal sweep over the length."""
    if quick:
        sweep = [_case(f"length {n}, window 9", 1, 2, (n,), (9,), 8, sweep=True) for n in (32, 64)]
        return [_case("8×8, window 3", 1, 2, (8, 8), (3, 3), 8, rpb=True), *sweep]
    batch = 4 if device.startswith("cuda") else 1
    return [
        _case("NAT stage 1, 56×56, window 7", batch, 2, (56, 56), (7, 7), 32),
        _case("NAT stage 1 with relative bias", batch, 2, (56, 56), (7, 7), 32, rpb=True),
        _case("DiNAT stage 1, dilation 8", batch, 2, (56, 56), (7, 7), 32, dilation=8),
        _case("NAT stage 3, 14×14, window 7", 8 * batch, 8, (14, 14), (7, 7), 32),
        _case("volume 8×16×20, window 5×7×7", batch, 2, (8, 16, 20), (5, 7, 7), 32),
        *(
            _case(f"length {n}, window 255, causal", batch, 2, (n,), (255,), 64, sweep=True, is_causal=True)
            for n in LENGTHS
        ),
    ]


# Whole: a case is its inputs and its peers, which share the sizes.
def _case(
    name: str,
    batch: int,
    heads: int,
    grid: tuple[int, ...],
    kernel: tuple[int, ...],
    width: int,
    *,
    dilation: int = 1,
    rpb: bool = False,
    is_causal: bool = False,
    sweep: bool = False,
) -> BenchCase:
    options: dict[str, Any] = {"dilation": dilation, "is_causal": is_causal}

    def inputs() -> Inputs:
        data = {x: torch.randn(batch, *grid, heads, width, dtype=torch.float64) for x in "qkv"}
        if rpb:
            data["rpb"] = torch.randn(heads, *(2 * size - 1 for size in kernel), dtype=torch.float64)
        return data

    def split(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        return x["q"].movedim(-2, 1), x["k"].movedim(-2, 1), x["v"].movedim(-2, 1)

    def ours(x: Inputs, backend: Backend) -> Tensor:
        return neighborhood_attention(*split(x), kernel, rpb=x.get("rpb"), **options, backend=backend)[0]

    def natten(x: Inputs) -> Call:
        if rpb:
            raise UnavailableError("natten has no relative bias since 0.20")
        try:
            functional = importlib.import_module("natten.functional")
        except ImportError:
            raise UnavailableError("natten is not installed") from None
        backend = None if x["q"].is_cuda else "flex-fna"
        run = functional.neighborhood_attention_generic
        return lambda: run(x["q"], x["k"], x["v"], kernel_size=kernel, backend=backend, **options).movedim(-2, 1)

    def masked(x: Inputs) -> Call:
        mask = _mask(grid, kernel, dilation, is_causal).to(x["q"].device)

        def run() -> Tensor:
            q, k, v = (t.flatten(2, -2) for t in split(x))
            bias = mask.to(q.dtype)
            if rpb:
                bias = bias + x["rpb"].flatten(1)[:, _positions(grid, kernel).to(q.device)]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).unflatten(2, grid)

        return run

    def gathered(x: Inputs) -> Call:
        mask = _mask(grid, kernel, dilation, is_causal)
        order = mask.sort(stable=True, dim=-1, descending=True).indices[:, : math.prod(kernel)].to(x["q"].device)
        picked = mask.to(order.device).gather(1, order)
        places = _positions(grid, kernel).to(order.device).gather(1, order) if rpb else None

        def run() -> Tensor:
            q, k, v = (t.flatten(2, -2) for t in split(x))
            scores = (q.unsqueeze(3) * width**-0.5 * k[:, :, order]).sum(-1) + picked.to(q.dtype)
            if places is not None:
                scores = scores + x["rpb"].flatten(1)[:, places]
            return (scores.softmax(-1).unsqueeze(-1) * v[:, :, order]).sum(3).unflatten(2, grid)

        return run

    cells = math.prod(grid)
    providers = backends(ours, "q")
    providers["natten"] = Provider(natten, remark="on a CPU its flex_attention path: forward only")
    providers["SDPA, dense mask"] = Provider(masked)
    # The gather holds every window of keys: at long windows only SDPA is worth its time.
    if math.prod(kernel) < 100:
        providers["gathered windows"] = Provider(gathered)
    return BenchCase(
        name,
        inputs,
        providers,
        flops=4 * batch * heads * cells * math.prod(kernel) * width,
        length=cells if sweep else None,
    )


def _mask(grid: tuple[int, ...], kernel: tuple[int, ...], dilation: int, causal: bool) -> Tensor:
    """(N, N): 0 where a key is seen, −inf elsewhere."""
    visible = torch.ones(1, 1, dtype=torch.bool)
    for length, size in zip(grid, kernel, strict=True):
        rule = Axis(length, size, dilation, 1, causal, shifted=True)
        seen = torch.zeros(length, length, dtype=torch.bool)
        for i in range(length):
            first, last = rule.window(i // dilation, rule.cells(i % dilation))
            seen[i, i % dilation + first * dilation : i % dilation + last * dilation + 1 : dilation] = True
        visible = outer(visible, seen, torch.logical_and)
    return torch.zeros(visible.shape).masked_fill(~visible, -math.inf)


def _positions(grid: tuple[int, ...], kernel: tuple[int, ...]) -> Tensor:
    """(N, N) index into the flat relative bias, without dilation."""
    index = torch.zeros(1, 1, dtype=torch.int64)
    for length, size in zip(grid, kernel, strict=True):
        i = torch.arange(length)
        offset = (i - i[:, None] + size - 1).clamp(0, 2 * size - 2)
        index = outer(index * (2 * size - 1), offset, torch.add)
    return index
