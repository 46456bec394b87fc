"""What all state-space blocks share: what the survey says about them, and what they refuse.

Survey: Heidari et al., Computation-Efficient Era: A Comprehensive Survey of State Space Models in Medical Image
Analysis, arXiv 2406.03430.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from attn_core.catalog import Card

CONVOLUTION: dict[int, type[nn.Conv1d] | type[nn.Conv2d] | type[nn.Conv3d]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
AXES = "Z Y X"
FAMILY = "State-space blocks"


@dataclass(frozen=True)
class BlockCard(Card):
    """A row of the survey's table.

    Attributes:
        kind: of architecture: base, bidirectional, planar, volumetric, hybrid.
        scan: the order, or orders, in which tokens are visited.
        dims: numbers of axes that a grid may have.
        modality: what the paper, or networks of the survey that use the block, were tested on.
    """

    kind: str = ""
    scan: str = ""
    dims: tuple[int, ...] = (1, 2, 3)
    modality: str = ""


def check_sizes(name: str, spatial_dims: int, dims: Sequence[int], **sizes: int) -> None:
    """Raise ValueError unless ``spatial_dims`` is one of ``dims`` and every other size is at least 1."""
    if spatial_dims not in dims:
        raise ValueError(f"{name}: spatial_dims must be one of {', '.join(map(str, dims))}, got {spatial_dims}")
    for argument, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name}: {argument} must be at least 1, got {argument}={size}")


def check_map(name: str, x: Tensor, dim: int, spatial_dims: int) -> None:
    """Raise ValueError unless x is (B, *grid, C) of C channels and as many axes as the block was made for."""
    if x.ndim != spatial_dims + 2 or x.shape[-1] != dim or 0 in x.shape[1:]:
        axes = " ".join(AXES.split()[-spatial_dims:])
        raise ValueError(f"{name}: expected (B {axes} {dim}) with sides of at least 1, got shape {tuple(x.shape)}")
