"""Benchmark of :func:`attn_core.linear_attention`: lightning attention's sizes, and vision's form without order."""

from typing import Any

import torch
from torch import Tensor

from attn_core import linear_attention
from attn_core.dispatch import Backend

from .case import BenchCase, Call, Inputs, Provider, UnavailableError, backends

LENGTHS = (512, 1024, 2048, 4096)
GPU_LENGTHS = (1024, 4096, 16384, 65536, 131072)


def cases(device: str, quick: bool) -> list[BenchCase]:
    """Causal with decay, both ways at vision sizes, and a sweep over the length."""
    on_gpu = device.startswith("cuda")
    if quick:
        sizes = [("causal, decay, 64 tokens", 1, 2, 64, 16, True), ("both ways, 64 tokens", 1, 2, 64, 16, False)]
    else:
        tokens, batch = (8192, 8) if on_gpu else (1024, 1)
        sizes = [
            (f"lightning, {tokens} tokens, 16 heads of 128", 1, 16, tokens, 128, True),
            ("vision, both ways, 3136 tokens", batch, 2, 3136, 32, False),
        ]
    listed = [_case(*size) for size in sizes]
    for n in (16, 32) if quick else GPU_LENGTHS if on_gpu else LENGTHS:
        listed.append(_case(f"length {n}, 4 heads of 64", 1, 4, n, 64, True, sweep=True))
    return listed


def _case(
    name: str, batch: int, heads: int, tokens: int, width: int, causal: bool, *, sweep: bool = False
) -> BenchCase:
    """Causal cases have the decays of ALiBi, the others none."""
    slopes = 2.0 ** (-8.0 * torch.arange(1, heads + 1) / heads)

    def inputs() -> Inputs:
        return {name: torch.randn(batch, tokens, heads, width, dtype=torch.float64) * 0.3 for name in "qkv"}

    def options(x: Inputs) -> dict[str, Any]:
        dtype = torch.float64 if x["q"].dtype == torch.float64 else torch.float32
        return {"causal": causal, "log_decay": (-slopes).to(x["q"].device, dtype) if causal else None}

    def ours(x: Inputs, backend: Backend) -> Tensor:
        return linear_attention(*_split(x), **options(x), backend=backend)[0]

    def in_full(x: Inputs) -> Tensor:
        """The N×N products."""
        q, k, v = _split(x)
        s = q @ k.mT
        if causal:
            i = torch.arange(tokens, device=q.device)
            decay = -slopes.to(q.device)[:, None, None] * (i[:, None] - i).clamp(min=0)
            s = (s * decay.exp().tril()).to(q.dtype)
        return s @ v

    providers = {**backends(ours, "q"), "N×N products": Provider(lambda x: lambda: in_full(x))}
    if causal:
        providers["step by step"] = Provider(lambda x: lambda: _steps(x, slopes))
        providers["fla chunk_simple_gla"] = Provider(lambda x: _fla(x, -slopes))
    else:
        providers["two products"] = Provider(lambda x: lambda: _two_products(x))
    flops = 4 * batch * heads * tokens * width * (width + (64 if causal else 0))
    return BenchCase(name, inputs, providers, flops=flops, length=tokens if sweep else None)


def _split(x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return x["q"].transpose(1, 2), x["k"].transpose(1, 2), x["v"].transpose(1, 2)


def _two_products(x: Inputs) -> Tensor:
    q, k, v = _split(x)
    return q @ (k.mT @ v)


def _steps(x: Inputs, slopes: Tensor) -> Tensor:
    """The recurrence, one token at a time."""
    q, k, v = _split(x)
    decay = torch.exp(-slopes).to(q.device, q.dtype)[:, None, None]
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    outs = []
    for qi, ki, vi in zip(q.unbind(2), k.unbind(2), v.unbind(2), strict=True):
        state = decay * state + ki.unsqueeze(-1) * vi.unsqueeze(-2)
        outs.append((qi.unsqueeze(-2) @ state).squeeze(-2))
    return torch.stack(outs, 2)


def _fla(x: Inputs, log_decay: Tensor) -> Call:
    if x["q"].device.type != "cuda":
        raise UnavailableError("flash-linear-attention's kernels need a GPU")
    try:
        from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UnavailableError("flash-linear-attention is not installed") from error
    gates = log_decay.to(x["q"].device).expand(*x["q"].shape[:3])
    return lambda: chunk_simple_gla(x["q"], x["k"], x["v"], g=gates, scale=1.0)[0].transpose(1, 2)  # pyright: ignore[reportCallIssue]
