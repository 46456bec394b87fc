"""Selective scans of maps along routes: sequences of tokens, each walked by a state space of its own.

Paper: Liu et al., VMamba, NeurIPS 2024 (arXiv 2401.10166), whose SS2D is VM-UNet's scan; the parameters and their start
values are Mamba's (arXiv 2312.00752). Official code: https://github.com/JCruan519/VM-UNet (Apache-2.0),
models/vmunet/vmamba.py (``SS2D``).

Same: names, start values, results. Differs: a route and its reverse are one sequence, which is not copied backwards
(`attn_core.selective_scan` walks it from its end); no compiled extension.
Checked: tests/models/test_vm_unet.py, against a loop over tokens.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core import selective_scan

WALKS = 4  # two routes from both ends


class Walks(NamedTuple):
    """Parameters of walks, one set for each of S sequences.

    Attributes:
        maps: token → step before its projection, input map, output map (S, r + 2N, C).
        step: of r numbers to C (S, C, r).
        bias: of the step (S, C).
        decay: log of −A (S, C, N).
        skip: D (S, C).
    """

    maps: Tensor
    step: Tensor
    bias: Tensor
    decay: Tensor
    skip: Tensor


class StateSpaces(nn.Module):
    """State spaces of walks over sequences of C channels, under VMamba's official names.

    Args:
        channels: C.
        states: N, numbers that each channel remembers.
        rank: r, of the step's projection.
        walks: S, how many: four for two routes from both ends.
    """

    def __init__(self, channels: int, states: int, rank: int, walks: int = WALKS) -> None:
        super().__init__()
        bound, step = channels**-0.5, rank**-0.5  # the first is nn.Linear's own
        self.x_proj_weight = nn.Parameter(torch.empty(walks, rank + 2 * states, channels).uniform_(-bound, bound))
        self.dt_projs_weight = nn.Parameter(torch.empty(walks, channels, rank).uniform_(-step, step))
        dt = torch.empty(walks, channels).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
        self.dt_projs_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # whose softplus is dt
        self.A_logs = nn.Parameter(torch.arange(1.0, states + 1).log().repeat(walks * channels, 1))
        self.Ds = nn.Parameter(torch.ones(walks * channels))

    def walks(self) -> Walks:
        """All of them."""
        shape = self.dt_projs_bias.shape
        decay, skip = self.A_logs.unflatten(0, shape), self.Ds.unflatten(0, shape)
        return Walks(self.x_proj_weight, self.dt_projs_weight, self.dt_projs_bias, decay, skip)


def walk_both_ways(
    x: Float[Tensor, "B S C T"], forwards: Walks, backwards: Walks
) -> tuple[Float[Tensor, "B S C T"], Float[Tensor, "B S C T"]]:
    """Each sequence walked from its beginning and from its end; results stand in the order of the sequence."""
    return walk(x, forwards), walk(x, backwards, reverse=True)


def walk(x: Float[Tensor, "B S C T"], walks: Walks, *, reverse: bool = False) -> Float[Tensor, "B S C T"]:
    """Each sequence walked from its beginning, or from its end; in the dtype of the parameters."""
    states, rank = walks.decay.shape[-1], walks.step.shape[-1]
    # Scans sum in float32 at least, whatever autocast has chosen for the maps; officially, too.
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    found = torch.einsum("bsct,skc->bskt", x, walks.maps)
    low, entry, leave = found.to(exact).split([rank, states, states], 2)
    delta = torch.einsum("bsrt,scr->bsct", low, walks.step.to(exact))
    y = scan(
        x.to(exact).flatten(1, 2),
        delta.to(exact).flatten(1, 2),  # autocast takes the product to half precision
        -walks.decay.to(exact).exp().flatten(0, 1),
        entry,
        leave,
        walks.skip.to(exact).flatten(),
        walks.bias.to(exact).flatten(),
        reverse=reverse,
    )
    return y.view(x.shape).to(walks.maps.dtype)


def scan(
    u: Float[Tensor, "B C T"],
    delta: Float[Tensor, "B C T"],
    A: Float[Tensor, "C N"],
    B: Float[Tensor, "B G N T"],
    C: Float[Tensor, "B G N T"],
    D: Float[Tensor, " C"],
    bias: Float[Tensor, " C"],
    *,
    reverse: bool = False,
) -> Float[Tensor, "B C T"]:
    """The core's selective scan, its step the softplus of ``delta`` + ``bias``; in exported graphs, plain operators."""
    if torch.compiler.is_exporting():
        return doubled(u, delta, A, B, C, D, bias, reverse)
    with torch.autocast(u.device.type, enabled=False):
        return selective_scan(u, delta, A, B.contiguous(), C.contiguous(), D, delta_bias=bias, delta_softplus=True,
                              reverse=reverse)[0]  # fmt: skip


def doubled(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor, reverse: bool
) -> Tensor:
    """The scan in ⌈log₂ T⌉ rounds of plain operators, for exported graphs; holds the states of all tokens.

    After a round of width w each token has gathered what the w tokens before it left: h = a·h′ + b for pairs (a, b).
    """
    each = u.shape[1] // B.shape[1]
    step = F.softplus(delta + bias[:, None])
    entry, leave = (value.repeat_interleave(each, 1) for value in (B, C))
    if reverse:
        u, step, entry, leave = (value.flip(-1) for value in (u, step, entry, leave))
    a = torch.exp(step[:, :, None] * A[..., None])
    b = (step * u)[:, :, None] * entry
    width = 1
    while width < u.shape[-1]:
        before = F.pad(b[..., :-width], (width, 0))
        b = a * before + b
        a = a * F.pad(a[..., :-width], (width, 0))
        width *= 2
    y = (b * leave).sum(2) + D[:, None] * u
    return y.flip(-1) if reverse else y
