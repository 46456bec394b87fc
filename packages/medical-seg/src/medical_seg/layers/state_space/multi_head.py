"""Multi-head scan: channels are split into heads, each walked along routes of its own, whose results are fused.

Paper: Ji, MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba, arXiv 2406.05992.
Official code: https://github.com/PixDeep/MHS-VM (Apache-2.0), models/vmunet/mhsm.py.

Same: every layer and name, the orders of all routes, the fusion (no learned weights), start values.
Differs: routes of any grid; all heads are scanned in one call; the fusion's threshold is a buffer.
Checked: tests/models/test_mhs_vm.py, against a plain network with a loop over tokens.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core.catalog import Entry

from .contract import FAMILY, BlockCard, check_map, check_sizes
from .routes import PATTERNS, route_tables
from .walks import StateSpaces, Walks, walk_both_ways


class RouteFusion(nn.Module):
    """The sum of four walks, weighed by how much they differ: s·ReLU(σ / mean(y − min y) − t).

    Args:
        threshold: t; places whose walks vary less are 0.
    """

    t: Tensor

    def __init__(self, threshold: float) -> None:
        super().__init__()
        self.register_buffer("t", torch.tensor(float(threshold)))

    def forward(self, walks: Float[Tensor, "B H K C T"]) -> Float[Tensor, "B H C T"]:
        """The K walks of each head as one. Where they are equal the deviation has no derivative, and 0 is taken."""
        if not len(walks):
            return walks.sum(2)  # of no samples torch's deviation warns
        above = walks - walks.amin(2, keepdim=True)
        variation = walks.std(2) / (above.mean(2) + 1e-5)
        return walks.sum(2) * F.relu(variation - self.t.to(walks.dtype))


class ScanHead(nn.Module):
    """The state spaces of one head, under its official name."""

    def __init__(self, channels: int, states: int) -> None:
        super().__init__()
        self.mambaeng = StateSpaces(channels, states, math.ceil(channels / 16))


class MultiHeadScan(nn.Module):
    """Channels are projected to heads, each scanned along two routes from both ends, fused, joined and projected.

    Args:
        dim: C.
        heads: 3 for routes C, X, S; 4 for Z, too. See `medical_seg.layers.state_space.routes`.
        states: numbers that each channel remembers.
        threshold: of the fusion.
    """

    def __init__(self, dim: int, heads: int, states: int, threshold: float) -> None:
        super().__init__()
        self.patterns = PATTERNS[:heads]
        self.width = width = dim // heads
        self.x_ssproj = nn.Linear(dim, heads * width, bias=False)
        for pattern in self.patterns:
            self.add_module(f"scanhead_{pattern}", ScanHead(width, states))
        self.fusion = RouteFusion(threshold)
        self.cat_norm = nn.LayerNorm(heads * width)
        self.y_proj = nn.Linear(heads * width, dim, bias=False)

    def forward(self, x: Float[Tensor, "B Y X C"]) -> Float[Tensor, "B Y X C"]:
        """The same shape."""
        batch, height, width, _ = x.shape
        heads = len(self.patterns)
        orders, inverses = route_tables(self.patterns, height, width, x.device)
        parts = self.x_ssproj(x).flatten(1, 2).transpose(1, 2).unflatten(1, (heads, self.width))
        routes = [parts[:, k // 2].index_select(-1, order) for k, order in enumerate(orders)]
        there, back = walk_both_ways(
            torch.stack(routes, 1), self._walks(slice(0, None, 2)), self._walks(slice(1, None, 2))
        )
        both = torch.stack([there, back], 2)  # B, heads·2, 2, C, T: each route with its reverse
        walks = [both[:, k].index_select(-1, inverse) for k, inverse in enumerate(inverses)]
        fused = self.fusion(torch.stack(walks, 1).view(batch, heads, 4, *parts.shape[2:]))
        joined = fused.flatten(1, 2).transpose(1, 2)
        return self.y_proj(self.cat_norm(joined)).view(x.shape)

    def _walks(self, which: slice) -> Walks:
        """Of all heads: their first and second route, from one end."""
        each = [getattr(self, f"scanhead_{pattern}").mambaeng.walks() for pattern in self.patterns]
        return Walks(*(torch.cat([values[which] for values in group]) for group in zip(*each, strict=True)))


class GatedScan(nn.Module):
    """A convolution, the multi-head scan, and a gate; no expansion and no projection behind it.

    Args:
        dim: C.
        spatial_dims: 2.
        states: numbers that each channel remembers.
        heads: 3 for routes C, X, S; 4 for Z, too.
        threshold: of the fusion.

    Shapes: (B, Y, X, C) → same.
    Raises: ValueError for other heads, sizes below 1, and a map of another shape.
    """

    def __init__(
        self, dim: int, *, spatial_dims: int = 2, states: int = 16, heads: int = 4, threshold: float = 0.5
    ) -> None:
        check_sizes("GatedScan", spatial_dims, (2,), dim=dim, states=states)
        if heads not in (3, 4) or heads > dim:
            raise ValueError(f"GatedScan: heads must be 3 or 4 and at most dim={dim}, got heads={heads}")
        super().__init__()
        self.dim = dim
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.mhs = MultiHeadScan(dim, heads, states, threshold)
        self.out_norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "B Y X C"]) -> Float[Tensor, "B Y X C"]:
        """What the heads gather, normalized and gated."""
        check_map("GatedScan", x, self.dim, 2)
        x, gate = self.in_proj(x).chunk(2, -1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return self.out_norm(self.mhs(x)) * F.silu(gate)


ENTRIES = [
    Entry(
        "multi_head",
        GatedScan,
        BlockCard(
            family=FAMILY,
            paper="2406.05992",
            code="https://github.com/PixDeep/MHS-VM",
            license="Apache-2.0",
            test="models/test_mhs_vm.py",
            summary="MHS-VM's block: heads with routes of their own, fused by their variation.",
            kind="planar",
            scan="to and fro, diagonals, spirals, rows and columns; both ends",
            dims=(2,),
            modality="dermoscopy",
        ),
    )
]
