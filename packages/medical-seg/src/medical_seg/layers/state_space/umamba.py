"""A stage of U-Mamba: a residual block of convolutions, then Mamba over the flattened grid.

Paper: Ma, Li, Wang, U-Mamba, arXiv 2401.04722. Official code: https://github.com/bowang-lab/U-Mamba,
umamba/nnunetv2/nets/UMambaEnc_3d.py (``BasicResBlock``, ``MambaLayer``).

Same: layers, their order, no residual around Mamba. Differs: tokens are always places (the original takes channels for
tokens where a map has fewer places than channels, which binds a network to one size); maps of one place are normalized
to the bias.
Checked: tests/layers/state_space/test_blocks.py, against a plain stage with a loop over tokens.

Shapes: (B, *grid, C) → same.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core.catalog import Entry

from .contract import CONVOLUTION, FAMILY, BlockCard, check_map, check_sizes
from .sequences import S6

SLOPE = 0.01  # of leaky ReLU
EPS = 1e-5


class UMambaStage(nn.Module):
    """Two convolutions beside a projection, then `S6` on the normalized tokens.

    Args:
        dim: C.
        spatial_dims: axes of the grid.
        states: numbers that each channel remembers.
        expand: inner channels of `S6` are so many times C.

    Raises: ValueError for sizes below 1, other numbers of axes, and a map of another shape.
    """

    def __init__(self, dim: int, *, spatial_dims: int = 2, states: int = 16, expand: int = 2) -> None:
        check_sizes("UMambaStage", spatial_dims, (1, 2, 3), dim=dim, states=states, expand=expand)
        super().__init__()
        self.dim, self.spatial_dims = dim, spatial_dims
        convolution = CONVOLUTION[spatial_dims]
        self.conv1 = convolution(dim, dim, 3, padding=1)
        self.norm1 = InstanceNorm(dim)
        self.conv2 = convolution(dim, dim, 3, padding=1)
        self.norm2 = InstanceNorm(dim)
        self.conv3 = convolution(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)
        self.mamba = S6(dim, spatial_dims=spatial_dims, states=states, expand=expand)

    def forward(self, x: Float[Tensor, "B *grid C"]) -> Float[Tensor, "B *grid C"]:
        """What Mamba makes of the convolved map."""
        check_map("UMambaStage", x, self.dim, self.spatial_dims)
        x = x.movedim(-1, 1)
        y = F.leaky_relu(self.norm1(self.conv1(x)), SLOPE)
        y = self.norm2(self.conv2(y)) + self.conv3(x)
        return self.mamba(self.norm(F.leaky_relu(y, SLOPE).movedim(1, -1)))


class InstanceNorm(nn.Module):
    """Zero mean and unit variance of each channel of each sample, then a scale and a bias for each channel.

    Unlike torch's, a map of a single place is legal.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B C *grid"]:
        """The same shape."""
        return torch.group_norm(x, x.shape[1], self.weight, self.bias, EPS)


ENTRIES = [
    Entry(
        "umamba",
        UMambaStage,
        BlockCard(
            family=FAMILY,
            paper="2401.04722",
            code="https://github.com/bowang-lab/U-Mamba",
            license="",
            test="layers/state_space/test_blocks.py",
            summary="U-Mamba's stage: convolutions, then Mamba.",
            kind="hybrid",
            scan="rows",
            modality="CT, MRI, endoscopy, microscopy",
        ),
    )
]
