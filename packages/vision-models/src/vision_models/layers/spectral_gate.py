"""The spectral gate of GFNet and SpectFormer: a map times a weight for each frequency and channel.

Papers: Rao et al., Global Filter Networks, NeurIPS 2021, arXiv 2107.00645; Patro et al., SpectFormer, arXiv 2304.06446.
Facts of raoyongming/GFNet, ``gfnet.py``: the transform is orthonormal both ways, and computed in float32. There the
result stays float32 in half precision, and the map has one size.

Multiplying spectra is a convolution around the map's edges, with one kernel as large as the map for each channel. For a
map of another size that kernel keeps its taps: around it there are zeros, or its ends are cut off.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

__all__ = ["SpectralGate", "resized_gate"]


def spectrum(weight: Tensor) -> Tensor:
    """The parameter (Y, X/2 + 1, C, 2) as complex numbers, in float32 or better."""
    exact = torch.float64 if weight.dtype == torch.float64 else torch.float32
    return torch.view_as_complex(weight.to(exact).contiguous())


def kernel_of(gate: Tensor, built: tuple[int, int]) -> Tensor:
    """Taps (Y, X, C) of the kernel whose spectrum is ``gate`` (Y, X/2 + 1, C); shift 0 in the middle, at (Y/2, X/2)."""
    taps = torch.fft.irfft2(gate, s=built, dim=(0, 1))
    return taps.roll((built[0] // 2, built[1] // 2), (0, 1))


def resized_gate(gate: Tensor, built: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """The gate (Y, X/2 + 1, C) of a map ``built`` for a map ``grid``: the same taps, with zeros around, or cut off."""
    taps = kernel_of(gate, built)
    for axis in (0, 1):
        before = grid[axis] // 2 - built[axis] // 2  # so that shift 0 lies in the middle again; negative cuts
        after = grid[axis] - built[axis] - before
        taps = F.pad(taps, (0, 0, 0, 0, before, after) if axis == 0 else (0, 0, before, after))
    return torch.fft.rfft2(taps.roll((-(grid[0] // 2), -(grid[1] // 2)), (0, 1)), dim=(0, 1))


@register_notrace_module  # compares sizes, which FX must not follow
class SpectralGate(nn.Module):
    """Inverse transform of weight · transform(x). (B, Y, X, dim) → same, in the dtype of x.

    Args:
        grid: rows and columns of the map that the weight is made for; other maps use it resized.
    """

    def __init__(self, dim: int, grid: tuple[int, int], **dd: Any) -> None:
        super().__init__()
        self.grid = grid
        self.complex_weight = nn.Parameter(torch.randn(grid[0], grid[1] // 2 + 1, dim, 2, **dd) * 0.02)

    def gate(self, grid: tuple[int, int]) -> Tensor:
        """Complex weights (Y, X/2 + 1, dim) for a map of that size."""
        own = spectrum(self.complex_weight)
        if torch.compiler.is_exporting() or grid[0] != self.grid[0] or grid[1] != self.grid[1]:
            return resized_gate(own, self.grid, grid)
        return own

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, dim) → same."""
        grid = (x.shape[1], x.shape[2])
        gate = self.gate(grid)
        transformed = torch.fft.rfft2(x.to(gate.real.dtype), dim=(1, 2), norm="ortho")
        return torch.fft.irfft2(transformed * gate, s=grid, dim=(1, 2), norm="ortho").to(x.dtype)
