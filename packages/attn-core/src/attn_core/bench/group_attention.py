"""Benchmark of :func:`attn_core.group_attention`: masses of a prompt, their redistribution, landmark blocks."""

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core import group_attention
from attn_core.dispatch import Backend

from .case import BenchCase, Inputs, Provider, backends

LENGTHS = (256, 512, 1024, 2048, 4096)


def cases(device: str, quick: bool) -> list[BenchCase]:
    """Prompts with and without redistribution, landmarks, and a sweep over the length."""
    if quick:
        sweep = [_prompt(f"length {n}, masses", 1, 2, n, 16, sweep=True) for n in (64, 128)]
        return [_prompt("redistribution, 64 tokens", 1, 2, 64, 16, redistribute=True), _landmarks(1, 2, 64, 7), *sweep]
    on_gpu = device.startswith("cuda")
    batch, heads = (4, 32) if on_gpu else (1, 8)
    return [
        _prompt("prompt of 640 tokens, redistribution", batch, heads, 640, 128, redistribute=True),
        _prompt("prompt of 2048 tokens, redistribution", batch, heads, 2048, 128, redistribute=True),
        _landmarks(batch, heads, 2048, 63),
        *(_prompt(f"length {n}, masses", 1, 4, n, 64, sweep=True) for n in LENGTHS),
    ]


def _split(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return x["q"].transpose(1, 2), x["k"].transpose(1, 2), x["v"].transpose(1, 2)


def _data(batch: int, tokens: int, heads: int, width: int) -> Tensor:
    return torch.randn(batch, tokens, heads, width, dtype=torch.float64)


def _map(x: Inputs) -> Tensor:
    """Causal attention weights in full: (B, H, N, M)."""
    q, k, _ = _split(x)
    s = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    return s.masked_fill(torch.ones_like(s[0, 0], dtype=torch.bool).triu(1), -torch.inf).softmax(-1)


def _prompt(
    name: str, batch: int, heads: int, tokens: int, width: int, *, redistribute: bool = False, sweep: bool = False
) -> BenchCase:
    """Groups of a prompt: text, image (the middle half), image sinks, text sinks; ``redistribute`` changes weights."""
    quarter = tokens // 4
    group = torch.zeros(1, tokens, dtype=torch.int64)
    group[:, quarter : 3 * quarter] = 1
    group[:, quarter : 3 * quarter : 16] = 2
    group[:, 0] = 3

    def inputs() -> Inputs:
        return {n: _data(batch, tokens, heads, width) for n in "qkv"}

    def weight(x: Inputs) -> Tensor:
        exact = torch.float64 if x["q"].dtype == torch.float64 else torch.float32
        return torch.tensor([0.3, 0.4, 0.2, 0.1], dtype=exact, device=x["q"].device).expand(1, 1, 1, 4)

    def ours(x: Inputs, backend: Backend) -> Tensor:
        factor = weight(x) if redistribute else None
        own = group.to(x["q"].device)
        return group_attention(*_split(x), own, 4, group_weight=factor, causal="upper_left", backend=backend)[0]

    def naive(x: Inputs) -> Tensor:
        p = _map(x)
        if redistribute:
            member = F.one_hot(group[0].to(p.device), 4).to(p.dtype)
            mass = p @ member
            factor = (weight(x) / mass.masked_fill(mass == 0, 1.0)).to(p.dtype)
            p = p * (factor @ member.T)
        return p @ _split(x)[2]

    peers = {"eager map": Provider(lambda x: lambda: naive(x))}
    if not redistribute:
        peers["SDPA"] = Provider(
            lambda x: lambda: F.scaled_dot_product_attention(*_split(x), is_causal=True), remark="without the masses"
        )
    flops = 2 * batch * heads * tokens * (tokens + 1) * width
    return BenchCase(name, inputs, {**backends(ours, "q"), **peers}, flops=flops, length=tokens if sweep else None)


def _landmarks(batch: int, heads: int, tokens: int, block: int) -> BenchCase:
    """Blocks of keys behind a landmark each, gated by one logit per query and block."""
    number = torch.arange(tokens) % (block + 1)
    group = torch.where(number == block, -1, torch.arange(tokens) // (block + 1))[None]
    groups = tokens // (block + 1)

    def inputs() -> Inputs:
        gate = torch.randn(batch, heads, tokens, groups, dtype=torch.float64)
        return {**{n: _data(batch, tokens, heads, 64) for n in "qkv"}, "gate": gate}

    def gate(x: Inputs) -> Tensor:
        return x["gate"] if x["q"].dtype == torch.float64 else x["gate"].float()

    def ours(x: Inputs, backend: Backend) -> Tensor:
        own = group.to(x["q"].device)
        return group_attention(*_split(x), own, groups, group_gate=gate(x), causal="upper_left", backend=backend)[0]

    def naive(x: Inputs) -> Tensor:
        q, k, v = _split(x)
        s = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        s = s.masked_fill(torch.ones_like(s[0, 0], dtype=torch.bool).triu(1), -torch.inf)
        s = s.unflatten(-1, (groups, block + 1))[..., :block]
        dead = (s == -torch.inf).all(-1)
        p = s.masked_fill(dead[..., None], 0.0).softmax(-1)
        w = gate(x).masked_fill(dead, -torch.inf).softmax(-1).nan_to_num(0.0).to(p.dtype)
        p = p * w[..., None]
        return p.flatten(-2) @ v.unflatten(2, (groups, block + 1))[..., :block, :].flatten(2, 3)

    flops = 2 * batch * heads * tokens * (tokens + 1) * 64
    peers = {"eager map": Provider(lambda x: lambda: naive(x))}
    return BenchCase(
        f"landmark blocks of {block}, {tokens} tokens", inputs, {**backends(ours, "q"), **peers}, flops=flops
    )
