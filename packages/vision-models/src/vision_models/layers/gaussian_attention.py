"""GAAM: Gaussian adaptive attention as a module for maps.

Paper, official code and numbers: :mod:`attn_core.nn.gaussian_attention`, where the layer stands. (B, C, Y, X) → same.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from collections.abc import Sequence

import torch
from timm.models import register_notrace_module

from attn_core.catalog import Card, Entry
from attn_core.nn.gaussian_attention import GaussianBlock


@register_notrace_module  # a leaf of FX graphs, as every module that is added to a network
class GAAM(GaussianBlock):
    """The block as a module for maps of any width; by default it weighs the channels of each place.

    Args:
        dim: channels, which its weights do not depend on.
        axes, num_heads, num_gaussians: as of the block.
    """

    def __init__(
        self,
        dim: int,  # noqa: ARG002  whoever adds a module to a network names it
        axes: int | Sequence[int] = 1,
        num_heads: int | Sequence[int] = 4,
        num_gaussians: int | Sequence[int] = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(axes, num_heads, num_gaussians, device=device, dtype=dtype)


CARD = Card(
    family="GAAM",
    paper="2401.11143",
    code="https://github.com/gioannides/Gaussian-Adaptive-Attention",
    license="Apache-2.0",
    test="layers/test_gaussian_attention.py",
)
ENTRIES = [Entry("gaam", GAAM, CARD("Weights from products of Gaussians along an axis, with a residual"))]
