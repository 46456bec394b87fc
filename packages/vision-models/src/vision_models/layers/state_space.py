"""The state-space model of a Mamba block on a token map, behind whatever mixes neighbors before it.

Paper: Gu and Dao, Mamba, arXiv 2312.00752, section 3.6; parameters, their names and starting values as in
state-spaces/mamba, ``mamba_ssm/modules/mamba_simple.py``. The map is read row by row, with ``reverse`` from its end.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from attn_core import selective_scan
from vision_models.layers.token_maps import Linear

STEPS = (1e-3, 1e-1)  # between which the step sizes of channels start, evenly in the logarithm


@register_notrace_module  # its sizes decide, which FX must not follow
class StateSpace(nn.Module):
    """scan(silu(x)) with steps, input and output maps that depend on the token. (B, Y, X, dim) → same.

    Args:
        state: numbers that each channel remembers.
        reverse: read from the last token to the first.
    """

    def __init__(self, dim: int, state: int = 16, *, reverse: bool = False, **dd: Any) -> None:
        super().__init__()
        self.state, self.reverse = state, reverse
        self.rank = math.ceil(dim / 16)
        self.x_proj = Linear(dim, self.rank + 2 * state, bias=False, **dd)
        self.dt_proj = Linear(self.rank, dim, **dd)
        self.A_log = nn.Parameter(torch.arange(1, state + 1, **dd).log().repeat(dim, 1))
        self.D = nn.Parameter(torch.ones(dim, **dd))
        self.start()

    def start(self) -> None:
        """Draw the map to step sizes anew; ``A_log`` and ``D`` start without chance."""
        nn.init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        low, high = map(math.log, STEPS)
        with torch.no_grad():
            step = torch.empty_like(self.dt_proj.bias).uniform_(low, high).exp_()
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of this is the step

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, dim) → same."""
        tokens = F.silu(x).flatten(1, 2)
        low, B, C = self.x_proj(tokens).split([self.rank, self.state, self.state], 2)
        exact = torch.float64 if tokens.dtype == torch.float64 else torch.float32
        scan = doubled if torch.compiler.is_exporting() else _scan
        out = scan(
            tokens.transpose(1, 2),
            self.dt_proj(low).transpose(1, 2),
            -self.A_log.to(exact).exp(),
            B.transpose(1, 2),
            C.transpose(1, 2),
            self.D.to(exact),
            self.reverse,
        )
        return out.transpose(1, 2).reshape(x.shape)


def _scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, reverse: bool) -> Tensor:
    maps = B.unsqueeze(1), C.unsqueeze(1)
    return selective_scan(u, delta, A, *maps, D, delta_softplus=True, reverse=reverse)[0]


def doubled(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, reverse: bool) -> Tensor:
    """The scan in ⌈log₂ T⌉ rounds of plain operators, for exported graphs; holds the states of all tokens.

    h_t = a_t h_{t−1} + b_t composes: before a round of width w, (a, b) of a token cover the w tokens up to it.

    Shapes: u, delta (B, C, T), A (C, N), B and C (B, N, T), D (C) → (B, C, T).
    """
    exact = A.dtype
    step = F.softplus(delta.to(exact))
    a = (step.unsqueeze(2) * A.unsqueeze(2)).exp()
    b = (step * u).unsqueeze(2) * B.unsqueeze(1)
    if reverse:
        a, b = a.flip(3), b.flip(3)
    width = 1
    while width < u.shape[2]:
        b = b + a * F.pad(b[..., :-width], (width, 0))
        a = a * F.pad(a[..., :-width], (width, 0), value=1.0)
        width *= 2
    if reverse:
        b = b.flip(3)
    return ((b * C.unsqueeze(1)).sum(2) + D.unsqueeze(1) * u).to(u.dtype)
