"""Benchmark of :func:`attn_core.additive_attention`: pointer scores, pooled values, one-query pooling."""

import torch
from torch import Tensor

from attn_core import additive_attention
from attn_core.dispatch import Backend

from .case import BenchCase, Inputs, Provider, backends

LENGTHS = (64, 128, 256, 512, 1024)


def cases(device: str, quick: bool) -> list[BenchCase]:
    """Pointing and pooling at published sizes, and a sweep over the length."""
    if quick:
        sweep = [_case(f"length {n}", 1, n, n, 16, 8, sweep=True) for n in (12, 24)]
        return [_case("pointer", 1, 12, 12, 16), _case("one query", 2, 1, 40, 16, 8), *sweep]
    on_gpu = device.startswith("cuda")
    scale = 16 if on_gpu else 1
    return [
        _case("pointer, 500 tokens, D 128", 2 * scale, 500, 500, 128),
        _case("pointer, 1000 tokens, D 512", 2 * scale if on_gpu else 1, 1000, 1000, 512),
        _case("pooled, 500 tokens, D 128, E 128", 2 * scale, 500, 500, 128, 128),
        _case("pointer, travelling salesman, 50 cities", 128, 50, 50, 128),
        _case("one query over 10000 instances, D 128, E 512", scale, 1, 10000, 128, 512),
        *(_case(f"length {n}, D 128, E 64", scale, n, n, 128, 64, sweep=True) for n in LENGTHS),
    ]


def _case(
    name: str, batch: int, queries: int, keys: int, width: int, value: int | None = None, *, sweep: bool = False
) -> BenchCase:
    def inputs() -> Inputs:
        def data(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64)

        drawn = {"q": data(batch, queries, width), "k": data(batch, keys, width), "w": data(width) * width**-0.5}
        return drawn if value is None else {**drawn, "value": data(batch, keys, value)}

    def ours(x: Inputs, backend: Backend) -> Tensor:
        return additive_attention(x["q"], x["k"], x["w"], x.get("value"), backend=backend)[0]

    def peer(x: Inputs) -> Tensor:
        scores = torch.tanh(x["q"][:, :, None] + x["k"][:, None]) @ x["w"]
        return scores if value is None else scores.softmax(-1) @ x["value"]

    providers = {**backends(ours, "q"), "tanh of the N×M×D sum": Provider(lambda x: lambda: peer(x))}
    # Sum, tanh and product with w count as one operation each.
    flops = batch * queries * keys * (3 * width + 2 * (value or 0))
    return BenchCase(name, inputs, providers, flops, length=keys if sweep else None)
