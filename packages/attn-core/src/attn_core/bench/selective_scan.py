"""Benchmark of :func:`attn_core.selective_scan` at the sizes of vision state-space models."""

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core import selective_scan
from attn_core.dispatch import Backend

from .case import BenchCase, Call, Inputs, Provider, UnavailableError, backends

LENGTHS = (196, 784, 1024)
GPU_LENGTHS = (196, 784, 3136, 16384)
WIDTH = 16


def cases(device: str, quick: bool) -> list[BenchCase]:
    """A stage of VMamba, and a sweep over the length."""
    on_gpu = device.startswith("cuda")
    if quick:
        listed = [_case("VMamba block", 1, 8, 49)]
    elif on_gpu:
        listed = [_case("VMamba stage 1, 192 channels × 3136", 64, 192, 3136)]
    else:
        listed = [_case("VMamba stage 2, 192 channels × 784", 1, 192, 784)]
    for n in (32, 64) if quick else GPU_LENGTHS if on_gpu else LENGTHS:
        channels = 8 if quick else 96
        listed.append(_case(f"length {n}, {channels} channels", 1, channels, n, sweep=True))
    return listed


def _case(name: str, batch: int, channels: int, steps: int, *, sweep: bool = False) -> BenchCase:
    def inputs() -> Inputs:
        def data(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64)

        maps = {name: data(batch, 1, WIDTH, steps) for name in "BC"}
        decay = -torch.arange(1, WIDTH + 1, dtype=torch.float64).repeat(channels, 1)
        sequences = {"u": data(batch, channels, steps), "delta": data(batch, channels, steps) - 3}
        return {**sequences, "A": decay, **maps, "D": data(channels)}

    def arguments(x: Inputs) -> tuple[Tensor, ...]:
        """Parameters in float32 at least, whatever the dtype of the data."""
        A, D = (p.float() if p.dtype != torch.float64 else p for p in (x["A"], x["D"]))
        return x["u"], x["delta"], A, x["B"], x["C"], D

    def ours(x: Inputs, backend: Backend) -> Tensor:
        u, delta, A, B, C, D = arguments(x)
        return selective_scan(u, delta, A, B, C, D, delta_softplus=True, backend=backend)[0]

    providers = {
        **backends(ours, "u"),
        "step by step": Provider(
            lambda x: lambda: _steps(*arguments(x)), remark="gates and terms of all steps first, then a loop"
        ),
        "mamba_ssm": Provider(lambda x: _mamba(arguments(x))),
    }
    flops = 7 * batch * channels * steps * WIDTH
    return BenchCase(name, inputs, providers, flops=flops, backward_factor=3, length=steps if sweep else None)


def _steps(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    delta = F.softplus(delta)
    gates = torch.exp(torch.einsum("bct,cn->tbcn", delta, A.to(delta.dtype)))
    terms = torch.einsum("bct,bnt->tbcn", delta * u, B[:, 0])
    h = torch.zeros_like(terms[0])
    outs = []
    for gate, term, read in zip(gates.unbind(0), terms.unbind(0), C[:, 0].unbind(-1), strict=True):
        h = gate * h + term
        outs.append((h @ read.unsqueeze(-1)).squeeze(-1))
    return torch.stack(outs, -1) + D.to(u.dtype)[:, None] * u


def _mamba(arguments: tuple[Tensor, ...]) -> Call:
    if arguments[0].device.type != "cuda":
        raise UnavailableError("mamba_ssm's kernels need a GPU")
    try:
        from mamba_ssm.ops.selective_scan_interface import (  # pyright: ignore[reportMissingImports]
            selective_scan_fn,
        )
    except ImportError as error:
        raise UnavailableError("mamba_ssm is not installed") from error
    return lambda: selective_scan_fn(*arguments, delta_softplus=True)
