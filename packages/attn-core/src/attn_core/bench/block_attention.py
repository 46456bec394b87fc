"""Benchmark of :func:`attn_core.block_attention`: BiFormer's routed regions, HaloNet's halos, Swin's windows.

The gather formulation is the one of the published codes, in our own words: cut the map into regions, copy the keys and
values that each region reads beside it, multiply, cut back. All providers start from the same tensors in map order.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core import block_attention, halo_index, topk_route, window_index
from attn_core.dispatch import Backend

from .case import BenchCase, Call, Inputs, Provider, backends

REGIONS = 7  # per side, in every stage of BiFormer
# name: (side of the map, channels, regions read)
BIFORMER = {
    "BiFormer stage 1, 56², C 64, top-1": (56, 64, 1),
    "BiFormer stage 2, 28², C 128, top-4": (28, 128, 4),
    "BiFormer stage 3, 14², C 256, top-16": (14, 256, 16),
}
SIDES = (28, 42, 56, 84, 112)


def cases(device: str, quick: bool) -> list[BenchCase]:
    """BiFormer's stages, HaloNet, windows, and a sweep over the side of the map."""
    if quick:
        sweep = [_routed(f"length {side * side}", 1, side, 32, 2, sweep=True) for side in (7, 14)]
        return [_routed("BiFormer, 14², C 64, top-4", 1, 14, 64, 4), _halo(1, 16, 64), _windows(1, 14, 64), *sweep]
    batch = 128 if device.startswith("cuda") else 8
    return [
        *(_routed(name, batch, *size) for name, size in BIFORMER.items()),
        _halo(batch, 64, 128),
        _windows(batch, 56, 96),
        *(_routed(f"length {side * side}, 49 regions, top-4", 1, side, 64, 4, sweep=True) for side in SIDES),
    ]


def _heads(x: Tensor, width: int = 32) -> Tensor:
    """(B, N, C) → (B, H, N, D), a view."""
    return x.unflatten(-1, (-1, width)).transpose(1, 2)


def _cut(x: Tensor, side: int, block: int) -> Tensor:
    """Map order to block order: (B, N, C) → (B, R, I, C)."""
    n = side // block
    return x.view(-1, n, block, n, block, x.shape[-1]).transpose(2, 3).reshape(x.shape[0], n * n, block**2, -1)


def _uncut(x: Tensor, side: int, block: int) -> Tensor:
    """Block order to map order: (B, R, I, C) → (B, N, C)."""
    n = side // block
    return x.view(-1, n, n, block, block, x.shape[-1]).transpose(2, 3).reshape(x.shape[0], side**2, -1)


def _softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Blocks (B, R, I, H, D) on gathered keys (B, R, M, H, D), scores in full → (B, R, I, H·D)."""
    s = torch.einsum("brihd,brjhd->brhij", q * scale, k)
    p = (s if bias is None else s + bias).softmax(-1)
    return torch.einsum("brhij,brjhd->brihd", p, v).flatten(-2)


def _flex(
    side: int, block: int, mask_mod: Callable[[Inputs], Any], score_mod: Any = None, scale: Any = None
) -> Provider:
    """flex_attention on tokens in block order, so that whole tiles can be skipped; building its mask is not timed."""

    def prepare(x: Inputs) -> Call:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        n, device = side * side, str(x["q"].device)
        mask = create_block_mask(mask_mod(x), x["q"].shape[0], None, n, n, device=device)
        modify = score_mod(x) if score_mod else None

        def call() -> Tensor:
            q, k, v = (_heads(_cut(x[name], side, block).flatten(1, 2)) for name in "qkv")
            out = compiled(q, k, v, score_mod=modify, block_mask=mask, scale=scale)
            return _heads(_uncut(out.transpose(1, 2).reshape(len(q), -1, block**2, x["v"].shape[-1]), side, block))  # pyright: ignore[reportAttributeAccessIssue]

        return call

    return Provider(prepare, compiles=True, remark="building the block mask is not timed")


def _routed(name: str, batch: int, side: int, channels: int, topk: int, *, sweep: bool = False) -> BenchCase:
    """Every region reads the ``topk`` regions whose mean keys match its mean query best."""
    block, regions, scale = side // REGIONS, REGIONS**2, channels**-0.5
    listed_tokens = topk * block**2

    def inputs() -> Inputs:
        q, k, v = (torch.randn(batch, side * side, channels, dtype=torch.float64) for _ in range(3))
        table, _ = topk_route(_cut(q, side, block).mean(2), _cut(k, side, block).mean(2), topk)
        index = window_index(side, side, (block, block))
        return {"q": q, "k": k, "v": v, "table": table, "index": index}

    def ours(x: Inputs, backend: Backend) -> Tensor:
        q, k, v = (_heads(x[name]) for name in "qkv")
        return block_attention(q, k, v, x["index"], x["index"], x["table"], scale=scale, backend=backend)[0]

    def gathered(x: Inputs) -> Tensor:
        q = _cut(x["q"], side, block)
        kv = _cut(torch.cat([x["k"], x["v"]], -1), side, block)
        listed = x["table"][:, 0, :, :, None, None].expand(-1, -1, -1, block**2, 2 * channels)
        chosen = kv[:, None].expand(-1, regions, -1, -1, -1).gather(2, listed).flatten(2, 3)
        q, k, v = (t.unflatten(-1, (-1, 32)) for t in (q, *chosen.chunk(2, -1)))
        return _heads(_uncut(_softmax_attention(q, k, v, scale), side, block))

    def masked(x: Inputs) -> Tensor:
        pairs = torch.zeros(batch, regions, regions, dtype=torch.bool, device=x["q"].device)
        pairs = pairs.scatter(2, x["table"][:, 0], True)
        region = (
            _cut(torch.arange(side**2, device=pairs.device).view(1, -1, 1), side, block).flatten().argsort() // block**2
        )
        mask = pairs[:, region][:, :, region][:, None]
        return F.scaled_dot_product_attention(*(_heads(x[name]) for name in "qkv"), attn_mask=mask, scale=scale)

    def mask_mod(x: Inputs) -> Any:
        pairs = torch.zeros(batch, regions, regions, dtype=torch.bool, device=x["q"].device)
        pairs = pairs.scatter(2, x["table"][:, 0], True)
        return lambda b, _, i, j: pairs[b, i // block**2, j // block**2]

    peers = {"gathered keys": Provider(lambda x: lambda: gathered(x))}
    if not sweep or side <= 56:
        peers["SDPA, dense mask"] = Provider(lambda x: lambda: masked(x))
    if not sweep:
        peers["flex compiled"] = _flex(side, block, mask_mod, scale=scale)
    return BenchCase(
        name,
        inputs,
        {**backends(ours, "q"), **peers},
        flops=4 * batch * side**2 * listed_tokens * channels,
        length=side**2 if sweep else None,
    )


# Whole: a case is its inputs and its peers, which share the sizes.
def _halo(batch: int, side: int, channels: int) -> BenchCase:
    """Each 8×8 block reads the 14×14 window around it, with a bias for each row and column of the window."""
    block, halo = 8, 3
    span, n = block + 2 * halo, side // block
    heads = channels // 32

    def inputs() -> Inputs:
        q, k, v = (torch.randn(batch, side * side, channels, dtype=torch.float64) for _ in range(3))
        tables = tuple(torch.randn(batch, heads, side * side, span, dtype=torch.float64) for _ in range(2))
        q_index = window_index(side, side, (block, block))
        return {
            "q": q,
            "k": k,
            "v": v,
            "tables": tables,
            "q_index": q_index,
            "kv_index": halo_index(side, side, (block, block), (halo, halo)),
        }

    def ours(x: Inputs, backend: Backend) -> Tensor:
        q, k, v = (_heads(x[name]) for name in "qkv")
        return block_attention(q, k, v, x["q_index"], x["kv_index"], axis_bias=x["tables"], backend=backend)[0]

    def window(x: Tensor) -> Tensor:
        """(B, N, C) → the overlapping windows (B, R, span², H, D), zeros outside the map."""
        padded = F.pad(x.view(batch, side, side, channels), (0, 0, halo, halo, halo, halo))
        windows = padded.unfold(1, span, block).unfold(2, span, block)  # (B, n, n, C, span, span)
        return windows.permute(0, 1, 2, 4, 5, 3).reshape(batch, n * n, span**2, heads, 32)

    def gathered(x: Inputs) -> Tensor:
        q = _cut(x["q"], side, block).unflatten(-1, (-1, 32))
        rows, columns = (
            _cut(t.transpose(1, 2).flatten(2), side, block).unflatten(-1, (heads, span)) for t in x["tables"]
        )
        bias = (rows[..., :, None] + columns[..., None, :]).flatten(-2).transpose(2, 3)  # (B, R, H, I, span²)
        outside = torch.zeros(x["kv_index"].shape[2:], dtype=q.dtype, device=q.device)
        bias = bias + outside.masked_fill(x["kv_index"][0, 0] < 0, -torch.inf)[:, None, None]
        out = _softmax_attention(q, window(x["k"]), window(x["v"]), 32**-0.5, bias)
        return _heads(_uncut(out, side, block))

    def coordinates(x: Inputs) -> tuple[Tensor, Tensor]:
        """Row and column of each token in block order."""
        order = x["q_index"].flatten().long()
        return order // side, order % side

    def mask_mod(x: Inputs) -> Any:
        y, z = coordinates(x)

        def seen(_b: Any, _h: Any, i: Any, j: Any) -> Any:
            top, left = y[i] // block * block - halo, z[i] // block * block - halo
            return (y[j] >= top) & (y[j] < top + span) & (z[j] >= left) & (z[j] < left + span)

        return seen

    def score_mod(x: Inputs) -> Any:
        y, z = coordinates(x)
        rows, columns = x["tables"]
        order = x["q_index"].flatten().long()

        def biased(score: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
            row = (y[j] - y[i] // block * block + halo).clamp(0, span - 1)
            column = (z[j] - z[i] // block * block + halo).clamp(0, span - 1)
            return score + rows[b, h, order[i], row] + columns[b, h, order[i], column]

        return biased

    providers = {
        **backends(ours, "q"),
        "gathered keys": Provider(lambda x: lambda: gathered(x)),
        "flex compiled": _flex(side, block, mask_mod, score_mod),
    }
    flops = 4 * batch * side**2 * span**2 * channels
    return BenchCase(f"HaloNet, {side}², block 8, halo 3, C {channels}", inputs, providers, flops=flops)


def _windows(batch: int, side: int, channels: int) -> BenchCase:
    block = 7

    def inputs() -> Inputs:
        q, k, v = (torch.randn(batch, side * side, channels, dtype=torch.float64) for _ in range(3))
        return {"q": q, "k": k, "v": v, "index": window_index(side, side, (block, block))}

    def ours(x: Inputs, backend: Backend) -> Tensor:
        q, k, v = (_heads(x[name]) for name in "qkv")
        return block_attention(q, k, v, x["index"], x["index"], backend=backend)[0]

    def gathered(x: Inputs) -> Tensor:
        q, k, v = (_cut(x[name], side, block).unflatten(-1, (-1, 32)) for name in "qkv")
        return _heads(_uncut(_softmax_attention(q, k, v, 32**-0.5), side, block))

    def per_window(x: Inputs) -> Tensor:
        q, k, v = (_heads(_cut(x[name], side, block).flatten(0, 1)) for name in "qkv")
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return _heads(_uncut(out.unflatten(0, (batch, -1)), side, block))

    providers = {
        **backends(ours, "q"),
        "gathered keys": Provider(lambda x: lambda: gathered(x)),
        "SDPA per window": Provider(lambda x: lambda: per_window(x)),
        "flex compiled": _flex(side, block, lambda _: lambda _b, _h, i, j: i // block**2 == j // block**2),
    }
    flops = 4 * batch * side**2 * block**2 * channels
    return BenchCase(f"Swin windows, {side}², window 7, C {channels}", inputs, providers, flops=flops)
