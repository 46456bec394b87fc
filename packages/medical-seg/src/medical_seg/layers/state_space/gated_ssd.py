"""Gated SSD, the block of Mamba-2: heads with one decay each, and a norm behind the gate.

Paper: Dao and Gu, Transformers are SSMs, ICML 2024 (arXiv 2405.21060). Official code:
https://github.com/state-spaces/mamba (Apache-2.0), mamba_ssm/modules/mamba2_simple.py (``Mamba2Simple``).

Same: layers, names, start values, results. Differs: 16 channels a head (officially 128) and 16 states (64), so that
narrow networks divide; no learned first state; no bounds on the step.
Checked: tests/layers/state_space/test_blocks.py, against a loop over tokens.

Shapes: (B, *grid, C) → same; tokens are read row by row.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core.catalog import Entry
from attn_core.composites.causal_conv1d import causal_conv1d

from .contract import FAMILY, BlockCard, check_map, check_sizes
from .walks import scan

EPS = 1e-5


class GatedSSD(nn.Module):
    """Mamba-2.

    Args:
        dim: C.
        spatial_dims: axes of the grid.
        states: numbers that each channel remembers.
        expand: inner channels are so many times C.
        head_dim: channels that share a decay and a step.
        kernel: tokens that the causal convolution reads.

    Raises: ValueError for sizes below 1, heads that do not divide, other numbers of axes, and a map of another shape.
    """

    def __init__(
        self,
        dim: int,
        *,
        spatial_dims: int = 2,
        states: int = 16,
        expand: int = 2,
        head_dim: int = 16,
        kernel: int = 4,
    ) -> None:
        sizes = {"dim": dim, "states": states, "expand": expand, "head_dim": head_dim, "kernel": kernel}
        check_sizes("GatedSSD", spatial_dims, (1, 2, 3), **sizes)
        inner = expand * dim
        if inner % head_dim:
            raise ValueError(f"GatedSSD: head_dim={head_dim} must divide expand·dim={inner}")
        super().__init__()
        self.dim, self.spatial_dims, self.states, self.head_dim = dim, spatial_dims, states, head_dim
        heads = inner // head_dim
        self.in_proj = nn.Linear(dim, 2 * inner + 2 * states + heads, bias=False)
        self.conv1d = nn.Conv1d(inner + 2 * states, inner + 2 * states, kernel, groups=inner + 2 * states)
        dt = torch.empty(heads).uniform_(math.log(1e-3), math.log(1e-1)).exp().clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # whose softplus is dt
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(heads))
        self.norm = RMSNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Float[Tensor, "B *grid C"]) -> Float[Tensor, "B *grid C"]:
        """What the heads gather, gated, then normalized."""
        check_map("GatedSSD", x, self.dim, self.spatial_dims)
        grid, heads = tuple(x.shape[1:-1]), len(self.D)
        inner = heads * self.head_dim
        gate, mixed, step = self.in_proj(x).flatten(1, -2).split([inner, inner + 2 * self.states, heads], -1)
        mixed, _ = causal_conv1d(
            mixed.transpose(1, 2), self.conv1d.weight.squeeze(1), self.conv1d.bias, activation="silu"
        )
        tokens, entry, leave = mixed.split([inner, self.states, self.states], 1)
        exact = torch.float64 if x.dtype == torch.float64 else torch.float32
        decay, skip, bias = (
            self._of_channels(p.to(exact)) for p in (-self.A_log.to(exact).exp(), self.D, self.dt_bias)
        )
        y = scan(
            tokens.to(exact),
            step.to(exact).transpose(1, 2).repeat_interleave(self.head_dim, 1),
            decay[:, None].expand(-1, self.states).contiguous(),
            entry[:, None].to(exact),
            leave[:, None].to(exact),
            skip,
            bias,
        )
        y = self.norm(y.transpose(1, 2) * F.silu(gate))
        return self.out_proj(y.to(self.out_proj.weight.dtype)).unflatten(1, grid)

    def _of_channels(self, of_heads: Tensor) -> Tensor:
        return of_heads.repeat_interleave(self.head_dim)


class RMSNorm(nn.Module):
    """x / √(mean x² + ε), scaled; computed in float32 at least."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C"]:
        """The same shape."""
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * self.weight


ENTRIES = [
    Entry(
        "ssd",
        GatedSSD,
        BlockCard(
            family=FAMILY,
            paper="2405.21060",
            code="https://github.com/state-spaces/mamba",
            license="Apache-2.0",
            test="layers/state_space/test_blocks.py",
            summary="Mamba-2's block on the rows of a grid.",
            kind="base",
            scan="rows, one decay a head",
            modality="text",
        ),
    )
]
