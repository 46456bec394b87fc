"""SS2D: a map scanned by rows and by columns, from both ends.

Paper: Liu et al., VMamba, NeurIPS 2024 (arXiv 2401.10166). Official code as VM-UNet carries it:
https://github.com/JCruan519/VM-UNet (Apache-2.0), models/vmunet/vmamba.py.

Same: every layer and name, start values, results. Differs: see `medical_seg.layers.state_space.walks`.
Checked: tests/models/test_vm_unet.py, against a plain network with a loop over tokens.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core.catalog import Entry

from .contract import FAMILY, BlockCard, check_map, check_sizes
from .walks import StateSpaces, Walks, walk_both_ways


class SS2D(StateSpaces):
    """A map scanned by rows and by columns, from both ends, between a convolution and a gate.

    Args:
        dim: C.
        spatial_dims: 2.
        states: numbers that each channel remembers.
        expand: inner channels are so many times C.

    Shapes: (B, Y, X, C) → same.
    Raises: ValueError for sizes below 1, and for a map of another shape.
    """

    def __init__(self, dim: int, *, spatial_dims: int = 2, states: int = 16, expand: int = 2) -> None:
        check_sizes("SS2D", spatial_dims, (2,), dim=dim, states=states, expand=expand)
        inner = expand * dim
        super().__init__(inner, states, math.ceil(dim / 16))
        self.dim = dim
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Float[Tensor, "B Y X C"]) -> Float[Tensor, "B Y X C"]:
        """What four walks gather, normalized and gated."""
        check_map("SS2D", x, self.dim, 2)
        x, gate = self.in_proj(x).chunk(2, -1)
        maps = F.silu(self.conv2d(x.permute(0, 3, 1, 2)))
        height, width = maps.shape[2:]
        rows, columns = maps.flatten(2), maps.transpose(2, 3).flatten(2)
        walks = self.walks()  # by rows, by columns, by rows from the end, by columns from the end
        there, back = walk_both_ways(
            torch.stack([rows, columns], 1), Walks(*(p[:2] for p in walks)), Walks(*(p[2:] for p in walks))
        )
        both = there + back
        y = both[:, 0] + both[:, 1].unflatten(2, (width, height)).transpose(2, 3).flatten(2)
        y = self.out_norm(y.transpose(1, 2).unflatten(1, (height, width)))
        return self.out_proj(y * F.silu(gate))


ENTRIES = [
    Entry(
        "ss2d",
        SS2D,
        BlockCard(
            family=FAMILY,
            paper="2401.10166",
            code="https://github.com/JCruan519/VM-UNet",
            license="Apache-2.0",
            test="models/test_vm_unet.py",
            summary="VMamba's block: rows and columns from both ends.",
            kind="planar",
            scan="rows, columns, both reversed",
            dims=(2,),
            modality="dermoscopy, CT, endoscopy",
        ),
    )
]
