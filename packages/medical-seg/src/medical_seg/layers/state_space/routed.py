"""Blocks in SS2D's frame with other routes, on grids of one to three axes: along every axis, in windows, every second
place.

Papers: three-axis SS3D after Wang et al., VMambaMorph, arXiv 2404.05105; windows after Huang et al., LocalMamba,
arXiv 2403.09338; atrous after Pei et al., EfficientVMamba, arXiv 2403.09977.

Same: LocalMamba's order of tokens in windows; EfficientVMamba's four sub-maps and their orders.
Differs: any grid (the originals fill odd maps up with zeros, which the scan reads); the frame is SS2D's for all.
Windows: two routes, rows and windows, from both ends, where the original searches directions for each layer, and no
channel attention behind the scan. Atrous: no squeeze-and-excitation branch beside the scan.
Checked: tests/layers/state_space/test_blocks.py, against a loop over tokens.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core.catalog import Entry

from .contract import CONVOLUTION, FAMILY, BlockCard, check_map, check_sizes
from .routes import along_each_axis, by_windows, sparse
from .walks import StateSpaces, Walks, walk, walk_both_ways

DIMS = (1, 2, 3)


class RoutedBlock(StateSpaces, ABC):
    """Convolution, walks, sum, norm and gate; a subclass says which walks.

    Args:
        dim: C.
        spatial_dims: axes of the grid.
        states: numbers that each channel remembers.
        expand: inner channels are so many times C.
        walks: how many.

    Shapes: (B, *grid, C) → same.
    Raises: ValueError for sizes below 1, other numbers of axes, and a map of another shape.
    """

    def __init__(self, dim: int, spatial_dims: int, states: int, expand: int, walks: int) -> None:
        inner = expand * dim
        super().__init__(inner, states, math.ceil(dim / 16), walks)
        self.dim, self.spatial_dims = dim, spatial_dims
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = CONVOLUTION[spatial_dims](inner, inner, 3, padding=1, groups=inner)
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Float[Tensor, "B *grid C"]) -> Float[Tensor, "B *grid C"]:
        """What the walks gather, normalized and gated."""
        check_map(type(self).__name__, x, self.dim, self.spatial_dims)
        grid = tuple(x.shape[1:-1])
        x, gate = self.in_proj(x).chunk(2, -1)
        maps = F.silu(self.conv(x.movedim(-1, 1)))
        y = self.gather(maps.flatten(2), grid)
        y = self.out_norm(y.transpose(1, 2).unflatten(1, grid))
        return self.out_proj(y * F.silu(gate))

    @abstractmethod
    def gather(self, tokens: Float[Tensor, "B C T"], grid: tuple[int, ...]) -> Float[Tensor, "B C T"]:
        """Sum of the walks, in the order of the grid."""

    def both_ways(self, tokens: Float[Tensor, "B C T"], orders: Int[Tensor, "R T"]) -> Float[Tensor, "B C T"]:
        """Sum of R orders walked from both ends: from their beginnings by the first R state spaces."""
        walks, count = self.walks(), len(orders)
        there, back = walk_both_ways(
            torch.stack([tokens.index_select(-1, order) for order in orders], 1),
            Walks(*(p[:count] for p in walks)),
            Walks(*(p[count:] for p in walks)),
        )
        both = (there + back).unbind(1)
        return _sum(y.index_select(-1, inverse) for y, inverse in zip(both, orders.argsort(1), strict=True))


class AxisScan(RoutedBlock):
    """SS3D: a walk along every axis, from both ends: six in a volume, in a plane the four of SS2D."""

    def __init__(self, dim: int, *, spatial_dims: int = 2, states: int = 16, expand: int = 2) -> None:
        check_sizes("AxisScan", spatial_dims, DIMS, dim=dim, states=states, expand=expand)
        super().__init__(dim, spatial_dims, states, expand, 2 * spatial_dims)

    def gather(self, tokens: Float[Tensor, "B C T"], grid: tuple[int, ...]) -> Float[Tensor, "B C T"]:
        """Sum over the axes."""
        return self.both_ways(tokens, along_each_axis(grid, tokens.device))


class WindowScan(RoutedBlock):
    """Row by row, and window by window, both from both ends: neighbors across rows meet early in the second.

    Args:
        window: side of the windows.
    """

    def __init__(self, dim: int, *, spatial_dims: int = 2, states: int = 16, expand: int = 2, window: int = 7) -> None:
        check_sizes("WindowScan", spatial_dims, DIMS, dim=dim, states=states, expand=expand, window=window)
        super().__init__(dim, spatial_dims, states, expand, 4)
        self.window = window

    def gather(self, tokens: Float[Tensor, "B C T"], grid: tuple[int, ...]) -> Float[Tensor, "B C T"]:
        """Sum of four walks."""
        windows = by_windows(grid, self.window, tokens.device)
        rows = torch.arange(len(windows), device=tokens.device)
        return self.both_ways(tokens, torch.stack([rows, windows]))


class AtrousScan(RoutedBlock):
    """Each of stepⁿ sparse grids walked once, from its beginning: every token is met once, not 2n times.

    Args:
        step: distance of neighbors in a sparse grid.
    """

    def __init__(self, dim: int, *, spatial_dims: int = 2, states: int = 16, expand: int = 2, step: int = 2) -> None:
        check_sizes("AtrousScan", spatial_dims, DIMS, dim=dim, states=states, expand=expand, step=step)
        super().__init__(dim, spatial_dims, states, expand, step**spatial_dims)
        self.step = step

    def gather(self, tokens: Float[Tensor, "B C T"], grid: tuple[int, ...]) -> Float[Tensor, "B C T"]:
        """The walk of the sparse grid that a token belongs to."""
        orders, where = sparse(grid, self.step, tokens.device)
        parts = torch.stack([tokens.index_select(-1, order) for order in orders], 1)
        found = walk(parts, self.walks())
        return found.transpose(1, 2).flatten(2).index_select(-1, where)


def _sum(parts: Iterable[Tensor]) -> Tensor:
    """Of at least one tensor."""
    first, *rest = parts
    for part in rest:
        first = first + part
    return first


def _card(paper: str, code: str, license: str, summary: str, kind: str, scan: str, modality: str) -> BlockCard:
    test = "layers/state_space/test_blocks.py"
    return BlockCard(FAMILY, paper, code, license, test, summary, "", kind, scan, DIMS, modality)


ENTRIES = [
    Entry(
        "ss3d",
        AxisScan,
        _card(
            "2404.05105",
            "https://github.com/ziyangwang007/VMambaMorph",
            "",
            "Every axis from both ends.",
            kind="volumetric",
            scan="along every axis, all reversed",
            modality="MRI to CT registration",
        ),
    ),
    Entry(
        "windowed",
        WindowScan,
        _card(
            "2403.09338",
            "https://github.com/hunto/LocalMamba",
            "Apache-2.0",
            "LocalMamba's windows beside rows.",
            kind="planar",
            scan="rows and windows, both reversed",
            modality="natural images",
        ),
    ),
    Entry(
        "atrous",
        AtrousScan,
        _card(
            "2403.09977",
            "https://github.com/TerryPei/EfficientVMamba",
            "",
            "EfficientVMamba's scan of every second place.",
            kind="planar",
            scan="sparse grids, once each",
            modality="natural images",
        ),
    ),
]
