"""Benchmark of :func:`attn_core.linear_scan`: gates of every feature, and Titans' weights with one gate each."""

import torch
from torch import Tensor

from attn_core import linear_scan
from attn_core.dispatch import Backend

from .case import BenchCase, Inputs, Provider, backends

LENGTHS = (256, 1024, 4096)
GPU_LENGTHS = (1024, 4096, 16384)


def cases(device: str, quick: bool) -> list[BenchCase]:
    """Gates of every feature, one gate for Titans' weights, and a sweep over the length."""
    on_gpu = device.startswith("cuda")
    if quick:
        listed = [_case("gates of every feature", 1, 64, (32,), (32,)), _case("one gate", 1, 16, (), (8, 8))]
    else:
        batch = 16 if on_gpu else 2
        listed = [
            _case("gates of every feature, 1024 steps of 512", batch, 1024, (512,), (512,)),
            _case("Titans weights, 64 chunks of 64×64", 4 * batch, 64, (), (64, 64)),
        ]
    for n in (32, 64) if quick else GPU_LENGTHS if on_gpu else LENGTHS:
        listed.append(_case(f"length {n}, 64 features", 1, n, (64,), (64,), sweep=True))
    return listed


def _case(
    name: str, batch: int, steps: int, gates: tuple[int, ...], features: tuple[int, ...], *, sweep: bool = False
) -> BenchCase:
    def inputs() -> Inputs:
        a = torch.rand(batch, steps, *gates, dtype=torch.float64)
        return {"a": a, "b": torch.randn(batch, steps, *features, dtype=torch.float64)}

    def ours(x: Inputs, backend: Backend) -> Tensor:
        return linear_scan(x["a"], x["b"], backend=backend)

    def steps_of(x: Inputs) -> Tensor:
        a = x["a"].reshape(*x["a"].shape, *[1] * (x["b"].ndim - x["a"].ndim))
        h = torch.zeros_like(x["b"][:, 0])
        states = []
        for gate, term in zip(a.unbind(1), x["b"].unbind(1), strict=True):
            h = gate * h + term
            states.append(h)
        return torch.stack(states, 1)

    def doubling(x: Inputs) -> Tensor:
        """log₂ T passes over the whole sequence, each joining runs of twice the length."""
        h = x["b"]
        a = x["a"].reshape(*x["a"].shape, *[1] * (h.ndim - x["a"].ndim))
        run = 1
        while run < steps:
            joined = h[:, run:] + a[:, run:] * h[:, :-run]
            h = torch.cat([h[:, :run], joined], 1)
            a = torch.cat([a[:, :run], a[:, run:] * a[:, :-run]], 1)
            run *= 2
        return h

    providers = {
        **backends(ours, "b"),
        "step by step": Provider(lambda x: lambda: steps_of(x)),
        "doubling": Provider(lambda x: lambda: doubling(x)),
    }
    count = batch * steps
    for size in features:
        count *= size
    return BenchCase(name, inputs, providers, flops=2 * count, backward_factor=3, length=steps if sweep else None)
