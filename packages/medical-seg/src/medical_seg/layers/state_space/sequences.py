"""Blocks that read a grid as sequences of tokens, each with a causal convolution and a state space of its own: S6,
bidirectional, tri-oriented.

Papers: Gu and Dao, Mamba, arXiv 2312.00752; Zhu et al., Vision Mamba, arXiv 2401.09417; Xing et al., SegMamba,
arXiv 2401.13560. Official code: https://github.com/state-spaces/mamba,
mamba_ssm/modules/mamba_simple.py; the forks of that file in https://github.com/hustvl/Vim (type v2) and
https://github.com/ge-xing/SegMamba (type v3).

Same: layers, start values, results. Differs: parameters of all sequences stand in one tensor, by number of the
sequence; the number of slices is the first side of the grid (officially a constant of each stage).
Checked: tests/layers/state_space/test_blocks.py, against a loop over tokens.

Shapes: (B, *grid, C) → same.
"""

import math
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core.catalog import Entry
from attn_core.composites.causal_conv1d import causal_conv1d

from .contract import FAMILY, BlockCard, check_map, check_sizes
from .routes import across_slices
from .walks import StateSpaces, walk


class SequenceBlock(StateSpaces):
    """Tokens in one or several orders, each convolved and walked from its beginning; their sum is gated.

    Args:
        dim: C.
        spatial_dims: axes of the grid.
        states: numbers that each channel remembers.
        expand: inner channels are so many times C.
        kernel: tokens that the causal convolution reads.

    Raises: ValueError for sizes below 1, other numbers of axes, and a map of another shape.
    """

    ways: ClassVar[int] = 1
    dims: ClassVar[tuple[int, ...]] = (1, 2, 3)

    def __init__(self, dim: int, *, spatial_dims: int = 2, states: int = 16, expand: int = 2, kernel: int = 4) -> None:
        name = type(self).__name__
        check_sizes(name, spatial_dims, self.dims, dim=dim, states=states, expand=expand, kernel=kernel)
        inner = expand * dim
        super().__init__(inner, states, math.ceil(dim / 16), self.ways)
        self.dim, self.spatial_dims = dim, spatial_dims
        bound = kernel**-0.5  # nn.Conv1d's own for one channel in
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(self.ways, inner, kernel).uniform_(-bound, bound))
        self.conv_bias = nn.Parameter(torch.empty(self.ways, inner).uniform_(-bound, bound))
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Float[Tensor, "B *grid C"]) -> Float[Tensor, "B *grid C"]:
        """What the walks gather, gated."""
        check_map(type(self).__name__, x, self.dim, self.spatial_dims)
        grid = tuple(x.shape[1:-1])
        tokens, gate = self.in_proj(x).flatten(1, -2).chunk(2, -1)
        tokens = tokens.transpose(1, 2)
        orders = _orders(self.ways, grid, x.device)
        sequences = torch.stack([tokens.index_select(-1, order) for order in orders], 1)
        weight, bias = self.conv_weight.flatten(0, 1), self.conv_bias.flatten()
        mixed, _ = causal_conv1d(sequences.flatten(1, 2), weight, bias, activation="silu")
        found = walk(mixed.unflatten(1, self.conv_bias.shape), self.walks())
        inverses = orders.argsort(1)
        y = torch.stack([found[:, k].index_select(-1, inverse) for k, inverse in enumerate(inverses)]).sum(0)
        return self.out_proj(y.transpose(1, 2) * F.silu(gate)).unflatten(1, grid)


class S6(SequenceBlock):
    """Mamba: row by row, from the first token to the last."""


class BiMamba(SequenceBlock):
    """Vision Mamba: row by row from both ends."""

    ways = 2


class TriOriented(SequenceBlock):
    """SegMamba: row by row from both ends, and through all slices at one place after the other."""

    ways, dims = 3, (2, 3)


def _orders(ways: int, grid: tuple[int, ...], device: torch.device) -> Int[Tensor, "K T"]:
    forwards = torch.arange(math.prod(grid), device=device)
    return torch.stack([forwards, forwards.flip(0), across_slices(grid, device)][:ways])


def _card(
    paper: str, code: str, license: str, summary: str, kind: str, scan: str, dims: tuple[int, ...], modality: str
) -> BlockCard:
    test = "layers/state_space/test_blocks.py"
    return BlockCard(FAMILY, paper, code, license, test, summary, "", kind, scan, dims, modality)


ENTRIES = [
    Entry(
        "s6",
        S6,
        _card(
            "2312.00752",
            "https://github.com/state-spaces/mamba",
            "Apache-2.0",
            "Mamba's block on the rows of a grid.",
            "base",
            "rows",
            (1, 2, 3),
            "text, audio, genomes",
        ),
    ),
    Entry(
        "bimamba",
        BiMamba,
        _card(
            "2401.09417",
            "https://github.com/hustvl/Vim",
            "Apache-2.0",
            "Vision Mamba's block.",
            "bidirectional",
            "rows, reversed",
            (1, 2, 3),
            "natural images; X-ray, slides",
        ),
    ),
    Entry(
        "tri_oriented",
        TriOriented,
        _card(
            "2401.13560",
            "https://github.com/ge-xing/SegMamba",
            "",
            "SegMamba's block.",
            "volumetric",
            "rows, reversed, through slices",
            (2, 3),
            "MRI, CT",
        ),
    ),
]
