"""Benchmark of :func:`attn_core.linear`: the token matrices of a four-stage pyramid at 224², batch 8."""

import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core import linear
from attn_core.dispatch import Backend

from .case import BenchCase, Inputs, Provider, backends

# name: (tokens, input width, output width, with GELU)
SIZES = {
    "stage 1 expand 96→384, GELU": (8 * 3136, 96, 384, True),
    "stage 1 contract 384→96": (8 * 3136, 384, 96, False),
    "stage 2 expand 192→768, GELU": (8 * 784, 192, 768, True),
    "stage 3 expand 384→1536, GELU": (8 * 196, 384, 1536, True),
    "stage 4 expand 768→3072, GELU": (8 * 49, 768, 3072, True),
    "qkv 96→288": (3136, 96, 288, False),
}
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)


def cases(device: str, quick: bool) -> list[BenchCase]:
    """Layers of published networks, and a sweep over the number of tokens."""
    scale = 16 if device.startswith("cuda") else 1
    sizes = {"stage 3 expand 384→1536, GELU": (49, 384, 1536, True)} if quick else SIZES
    listed = [_case(name, n * scale, width, out, gelu) for name, (n, width, out, gelu) in sizes.items()]
    lengths = (32, 64) if quick else LENGTHS
    return listed + [_case(f"length {n}, 192→768, GELU", n, 192, 768, True, sweep=True) for n in lengths]


def _case(name: str, tokens: int, width: int, out: int, gelu: bool, *, sweep: bool = False) -> BenchCase:
    def inputs() -> Inputs:
        def data(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64)

        return {"x": data(tokens, width), "weight": data(out, width) * width**-0.5, "bias": data(out)}

    def ours(x: Inputs, backend: Backend) -> Tensor:
        return linear(x["x"], x["weight"], x["bias"], "gelu" if gelu else None, backend=backend)

    def torchs(x: Inputs) -> Tensor:
        y = F.linear(x["x"], x["weight"], x["bias"])
        return F.gelu(y) if gelu else y

    providers = backends(ours, "x")
    del providers["triton"]  # it has none
    providers["F.linear + F.gelu" if gelu else "F.linear"] = Provider(lambda x: lambda: torchs(x))
    return BenchCase(
        name,
        inputs,
        providers,
        flops=2 * tokens * width * out,
        backward_factor=3,
        length=tokens if sweep else None,
    )
