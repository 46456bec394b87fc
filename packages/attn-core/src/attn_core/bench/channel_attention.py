"""Benchmark of :func:`attn_core.channel_attention`: the four stages of DaViT-T, and channel attention of maps."""

import torch
from torch import Tensor

from attn_core import channel_attention
from attn_core.dispatch import Backend

from .case import BenchCase, Inputs, Provider, backends

# name: (batch, tokens, heads, channels of a head)
STAGES = {
    "DaViT-T stage 1, 56²": (8, 3136, 3, 32),
    "DaViT-T stage 2, 28²": (8, 784, 6, 32),
    "DaViT-T stage 3, 14²": (8, 196, 12, 32),
    "DaViT-T stage 4, 7²": (8, 49, 24, 32),
    "DaViT-T stage 1, 448² image": (2, 12544, 3, 32),
}
LENGTHS = (1024, 2048, 4096, 8192, 16384)


def cases(device: str, quick: bool) -> list[BenchCase]:
    """DaViT's stages, DANet's map, and a sweep over the number of tokens."""
    if quick:
        return [*(_groups(f"length {n}", 2, n, 2, 8, sweep=True) for n in (49, 98)), _maps("map 8×8", 1, 64, 16)]
    scale = 16 if device.startswith("cuda") else 1
    return [
        *(_groups(name, batch * scale, n, heads, width) for name, (batch, n, heads, width) in STAGES.items()),
        _maps("DANet map 64×64, 512 channels", 2 * scale, 4096, 512),
        *(_groups(f"length {n}, 3 groups of 32", 2 * scale, n, 3, 32, sweep=True) for n in LENGTHS),
    ]


def _naive(a: Tensor, b: Tensor, x: Tensor, scale: float, negate_max: bool) -> Tensor:
    logits = (a * scale).mT @ b
    if negate_max:
        logits = logits.max(-1, keepdim=True).values - logits
    return (logits.softmax(-1) @ x.mT).mT


def _groups(name: str, batch: int, tokens: int, heads: int, width: int, *, sweep: bool = False) -> BenchCase:
    def inputs() -> Inputs:
        return {"qkv": torch.randn(batch, tokens, 3, heads, width, dtype=torch.float64)}

    def split(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = x["qkv"].permute(2, 0, 3, 1, 4)
        return k, v, q

    def ours(x: Inputs, backend: Backend) -> Tensor:
        y = channel_attention(*split(x), scale=width**-0.5, backend=backend)
        return y.transpose(1, 2).flatten(2)

    def peer(x: Inputs) -> Tensor:
        return _naive(*split(x), width**-0.5, False).transpose(1, 2).flatten(2)

    providers = {**backends(ours, "qkv"), "transpose + matmul": Provider(lambda x: lambda: peer(x))}
    flops = 4 * batch * tokens * heads * width**2
    return BenchCase(name, inputs, providers, flops, backward_factor=4, length=tokens if sweep else None)


def _maps(name: str, batch: int, tokens: int, channels: int) -> BenchCase:
    """One group, (B, C, Y, X) memory, channels attend to those least like them."""
    scale = channels**-0.5  # of DANet's 1: random features are less alike than trained ones

    def inputs() -> Inputs:
        return {"map": torch.randn(batch, channels, tokens, dtype=torch.float64)}

    def ours(x: Inputs, backend: Backend) -> Tensor:
        tokens_first = x["map"].mT[:, None]
        return channel_attention(
            tokens_first, tokens_first, tokens_first, scale=scale, negate_max=True, backend=backend
        )

    def peer(x: Inputs) -> Tensor:
        tokens_first = x["map"].mT[:, None]
        return _naive(tokens_first, tokens_first, tokens_first, scale, True)

    providers = {**backends(ours, "map"), "transpose + matmul": Provider(lambda x: lambda: peer(x))}
    return BenchCase(name, inputs, providers, 4 * batch * tokens * channels**2, backward_factor=4)
