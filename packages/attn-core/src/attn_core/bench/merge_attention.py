"""Benchmark of :func:`attn_core.merge_attention`: partial results of long contexts, at sizes of language models."""

import torch
from torch import Tensor

from attn_core import merge_attention
from attn_core.dispatch import Backend

from .case import BenchCase, Inputs, Provider, backends

LENGTHS = (1024, 2048, 4096, 8192, 16384)


def cases(device: str, quick: bool) -> list[BenchCase]:
    """Two and eight parts, and a sweep over the length with four."""
    if quick:
        return [_case("two parts, 64 tokens", 2, 1, 2, 64, 16), _case("length 64", 3, 1, 2, 64, 16, sweep=True)]
    batch = 8 if device.startswith("cuda") else 1
    return [
        _case("two parts, 2048 tokens", 2, batch, 16, 2048, 64),
        _case("eight parts, 2048 tokens", 8, batch, 16, 2048, 64),
        *(_case(f"length {n}, four parts", 4, 1, 8, n, 64, sweep=True) for n in LENGTHS),
    ]


def _case(name: str, parts: int, batch: int, heads: int, tokens: int, width: int, *, sweep: bool = False) -> BenchCase:
    def inputs() -> Inputs:
        # in memory as attention leaves them
        outs = [torch.randn(batch, tokens, heads, width, dtype=torch.float64).transpose(1, 2) for _ in range(parts)]
        return {**{f"out {s}": out for s, out in enumerate(outs)}, "lse": torch.randn(parts, batch, heads, tokens)}

    def operands(x: Inputs) -> tuple[list[Tensor], Tensor]:
        outs = [x[f"out {s}"] for s in range(parts)]
        return outs, x["lse"].to(torch.float64 if outs[0].dtype == torch.float64 else torch.float32)

    def ours(x: Inputs, backend: Backend) -> Tensor:
        return merge_attention(*operands(x), backend=backend)[0]

    def naive(x: Inputs) -> Tensor:
        outs, lses = operands(x)
        return (torch.stack(outs) * lses.softmax(0).unsqueeze(-1).to(outs[0].dtype)).sum(0)

    providers = backends(ours, "out 0")
    providers["stack + softmax"] = Provider(lambda x: lambda: naive(x))
    flops = 2 * parts * batch * heads * tokens * width
    return BenchCase(name, inputs, providers, flops=flops, backward_factor=3, length=tokens if sweep else None)
