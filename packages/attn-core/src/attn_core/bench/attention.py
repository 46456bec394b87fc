"""Benchmark of :func:`attn_core.attention`: plain, biased, grouped and unequal widths, at sizes of published models."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core import attention
from attn_core.dispatch import Backend

from .case import BenchCase, Call, Inputs, Provider, backends

LENGTHS = (256, 512, 1024, 2048, 4096)


def cases(device: str, quick: bool) -> list[BenchCase]:
    """Plain, biased, wide-valued and grouped attention, and a sweep over the length with an axis bias."""
    if quick:
        sweep = [_axis_bias("length 64", 1, 2, 64, (4, 16), 8, sweep=True)]
        sweep += [_axis_bias("length 128", 1, 2, 128, (8, 16), 8, sweep=True)]
        few = [_plain(1, 2, 64), _dense_bias(1, 2, 64), _wide_value(1, 64), _grouped(1, 64)]
        return [*few, _window(1, 64, 16), _packed((5, 40, 19)), *sweep]
    on_gpu = device.startswith("cuda")
    batch = 8 if on_gpu else 1
    return [
        _plain(2 * batch, 8, 1024),
        _dense_bias(2 * batch, 8, 576),
        _axis_bias("Plain-DETR decoder, 300 queries × 50×84", batch, 8, 300, (50, 84), 32),
        _axis_bias("Plain-DETR decoder, 1800 queries × 50×84", batch, 8, 1800, (50, 84), 32),
        _wide_value(batch, 4096),
        _grouped(batch, 2048),
        _window(batch, 4096, 256),
        _packed((37, 512, 90, 210, 803, 64, 300, 32) * batch),
        *(_axis_bias(f"length {n}, axis bias", 1, 4, n, (n // 32, 32), 32, sweep=True, flex=on_gpu) for n in LENGTHS),
    ]


def _split(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Heads as a projection leaves them: (B, N, H, D) memory seen as (B, H, N, D)."""
    return x["q"].transpose(1, 2), x["k"].transpose(1, 2), x["v"].transpose(1, 2)


def _data(batch: int, tokens: int, heads: int, width: int) -> Tensor:
    return torch.randn(batch, tokens, heads, width, dtype=torch.float64)


def _case(
    name: str,
    inputs: Any,
    options: Any,
    peers: dict[str, Provider],
    *,
    flops: float,
    length: int | None = None,
) -> BenchCase:
    """``options``: inputs → keyword arguments of the operator."""

    def ours(x: Inputs, backend: Backend) -> Tensor:
        return attention(*_split(x), **options(x), backend=backend)[0]

    return BenchCase(name, inputs, {**backends(ours, "q"), **peers}, flops=flops, length=length)


def _sdpa(remark: str | None = None, **options: Any) -> Provider:
    return Provider(lambda x: lambda: F.scaled_dot_product_attention(*_split(x), **options), remark=remark)


def _flex(score_mod: Any = None, **options: Any) -> Provider:
    """``score_mod``: inputs → function of flex_attention, which captures them."""

    def prepare(x: Inputs) -> Call:
        from torch.nn.attention.flex_attention import flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        modify = score_mod(x) if score_mod else None
        return lambda: compiled(*_split(x), score_mod=modify, **options)  # pyright: ignore[reportReturnType]

    return Provider(prepare, compiles=True)


def _plain(batch: int, heads: int, tokens: int) -> BenchCase:
    def inputs() -> Inputs:
        return {name: _data(batch, tokens, heads, 64) for name in "qkv"}

    peers = {"SDPA": _sdpa(), "flex compiled": _flex()}
    return _case(f"plain, {tokens} tokens", inputs, lambda _: {}, peers, flops=4 * batch * heads * tokens**2 * 64)


def _dense_bias(batch: int, heads: int, tokens: int) -> BenchCase:
    def inputs() -> Inputs:
        bias = torch.randn(1, heads, tokens, tokens, dtype=torch.float64)
        return {**{name: _data(batch, tokens, heads, 32) for name in "qkv"}, "bias": bias}

    def score_mod(x: Inputs) -> Any:
        return lambda score, _, h, i, j: score + x["bias"][0, h, i, j]

    peers = {
        "SDPA": Provider(
            lambda x: lambda: F.scaled_dot_product_attention(*_split(x), attn_mask=x["bias"]),
            remark="in training on torch's math path: the bias has a gradient",
        ),
        "flex compiled": _flex(score_mod),
    }
    return _case(
        f"learnable dense bias, {tokens} tokens",
        inputs,
        lambda x: {"bias": x["bias"]},
        peers,
        flops=4 * batch * heads * tokens**2 * 32,
    )


def _axis_bias(
    name: str,
    batch: int,
    heads: int,
    queries: int,
    grid: tuple[int, int],
    width: int,
    *,
    sweep: bool = False,
    flex: bool = True,
) -> BenchCase:
    rows, columns = grid
    keys = rows * columns

    def inputs() -> Inputs:
        tables = tuple(torch.randn(batch, heads, queries, size, dtype=torch.float64) for size in grid)
        q = _data(batch, queries, heads, width)
        return {"q": q, "k": _data(batch, keys, heads, width), "v": _data(batch, keys, heads, width), "tables": tables}

    def expanded(x: Inputs) -> Tensor:
        table_y, table_x = x["tables"]
        bias = (table_y[..., :, None] + table_x[..., None, :]).flatten(-2)
        return F.scaled_dot_product_attention(*_split(x), attn_mask=bias)

    def score_mod(x: Inputs) -> Any:
        table_y, table_x = x["tables"]
        return lambda score, b, h, i, j: score + table_y[b, h, i, j // columns] + table_x[b, h, i, j % columns]

    peers = {"SDPA, expanded bias": Provider(lambda x: lambda: expanded(x))}
    if flex:
        peers["flex compiled"] = _flex(score_mod)
    return _case(
        name,
        inputs,
        lambda x: {"axis_bias": x["tables"]},
        peers,
        flops=4 * batch * heads * queries * keys * width,
        length=queries if sweep else None,
    )


def _wide_value(batch: int, tokens: int) -> BenchCase:
    """Position attention of DANet: queries and keys an eighth of the value's width, one head."""
    width, value_width = 32, 256

    def inputs() -> Inputs:
        widths = {"q": width, "k": width, "v": value_width}
        return {name: _data(batch, tokens, 1, size) for name, size in widths.items()}

    def padded(x: Inputs) -> Tensor:
        q, k, v = _split(x)
        q, k = (F.pad(t, (0, value_width - width)) for t in (q, k))
        return F.scaled_dot_product_attention(q, k, v, scale=width**-0.5)

    peers = {
        "SDPA": _sdpa("on torch's math path: Dv ≠ D"),
        "SDPA, q and k zero-padded": Provider(lambda x: lambda: padded(x)),
        "flex compiled": _flex(),
    }
    flops = 2 * batch * tokens**2 * (width + value_width)
    return _case(f"position attention, {tokens} tokens, D 32, Dv 256", inputs, lambda _: {}, peers, flops=flops)


def _grouped(batch: int, tokens: int) -> BenchCase:
    heads, key_heads, width = 16, 4, 64

    def inputs() -> Inputs:
        counts = {"q": heads, "k": key_heads, "v": key_heads}
        return {name: _data(batch, tokens, count, width) for name, count in counts.items()}

    def causal_mask(x: Inputs) -> Call:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        mask = create_block_mask(lambda _b, _h, i, j: i >= j, None, None, tokens, tokens, device=str(x["q"].device))
        return lambda: compiled(*_split(x), block_mask=mask, enable_gqa=True)  # pyright: ignore[reportReturnType]

    peers = {"SDPA": _sdpa(is_causal=True, enable_gqa=True), "flex compiled": Provider(causal_mask, compiles=True)}
    flops = 2 * batch * heads * tokens * (tokens + 1) * width
    return _case(
        f"causal, 16 heads on 4, {tokens} tokens", inputs, lambda _: {"causal": "upper_left"}, peers, flops=flops
    )


def _window(batch: int, tokens: int, width: int) -> BenchCase:
    """A language model whose queries see the last ``width`` keys: Mistral's windows."""
    heads = 8

    def inputs() -> Inputs:
        return {name: _data(batch, tokens, heads, 64) for name in "qkv"}

    def seen(device: torch.device) -> Tensor:
        behind = torch.arange(tokens, device=device) - torch.arange(tokens, device=device)[:, None]
        return (behind <= 0) & (behind > -width)

    def masked(x: Inputs) -> Call:
        mask = seen(x["q"].device)
        return lambda: F.scaled_dot_product_attention(*_split(x), attn_mask=mask)

    def blocks(x: Inputs) -> Call:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        compiled = torch.compile(flex_attention, dynamic=False)
        device = str(x["q"].device)
        mask = create_block_mask(
            lambda _b, _h, i, j: (i >= j) & (i - j < width), None, None, tokens, tokens, device=device
        )
        return lambda: compiled(*_split(x), block_mask=mask)  # pyright: ignore[reportReturnType]

    peers = {"SDPA, dense mask": Provider(masked), "flex compiled": Provider(blocks, compiles=True)}
    options = {"window_size": (width - 1, 0)}
    flops = 4 * batch * heads * (tokens * width - width * (width - 1) // 2) * 64
    return _case(f"window of {width}, {tokens} tokens", inputs, lambda _: options, peers, flops=flops)


def _packed(lengths: tuple[int, ...]) -> BenchCase:
    """Sequences one behind the other, causal; a peer pads them to the longest."""
    heads, total = 8, sum(lengths)
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]

    def inputs() -> Inputs:
        return {name: _data(1, total, heads, 64) for name in "qkv"}

    def options(x: Inputs) -> dict[str, Any]:
        return {"causal": "lower_right", "cu_seqlens_q": torch.tensor(starts, device=x["q"].device)}

    def padded(x: Inputs) -> Call:
        # Where each token stands among the padded ones, and padding at the end of each row, which causality hides.
        place = torch.cat([i * max(lengths) + torch.arange(n) for i, n in enumerate(lengths)]).to(x["q"].device)

        def call() -> Tensor:
            rows = []
            for name in "qkv":
                room = x[name].new_zeros(len(lengths) * max(lengths), heads, 64)
                row = room.index_copy(0, place, x[name][0])
                rows.append(row.view(len(lengths), max(lengths), heads, 64).transpose(1, 2))
            out = F.scaled_dot_product_attention(*rows, is_causal=True)
            return out.transpose(1, 2).flatten(0, 1)[place][None].transpose(1, 2)

        return call

    flops = 2 * heads * sum(n * (n + 1) for n in lengths) * 64
    name = f"packed, {len(lengths)} sequences, {total} tokens"
    return _case(name, inputs, options, {"SDPA, padded": Provider(padded)}, flops=flops)
