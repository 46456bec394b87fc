"""ELA: a gate for the rows and one for the columns of a map, without reducing its channels.

Paper: Xu and Wan, ELA: Efficient Local Attention for Deep Convolutional Neural Networks, arXiv 2403.01123. The authors
released no code. Variant B agrees with what third parties wrote; the groups of S and L are *unverified*, as is whether
T and B are the paper's only depth-wise ones. Copies disagree on the kernel, both kinds of groups, a bias, and whether
rows and columns share their convolution: all of them are arguments.

What follows from the equations: the group norm sees a whole line, so that a gate depends on the length of the side,
and the convolution's zeros at the ends darken the border.

Numbers are checked in ``tests/layers/test_ela.py`` against the equations written out. (B, C, Y, X) → same.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from typing import Any, Literal

import torch
from timm.models import register_notrace_module
from torch import Tensor, nn

from attn_core.catalog import Card, Entry

Variant = Literal["t", "b", "s", "l"]
# kernel, channels of a group of the convolution, groups of the norm; s and l are unverified
TABLE: dict[str, tuple[int, int, int]] = {"t": (5, 1, 32), "b": (7, 1, 16), "s": (5, 8, 16), "l": (7, 8, 16)}


def divisor_below(number: int, bound: int) -> int:
    """The largest divisor of ``number`` that is at most ``bound``."""
    return max(d for d in range(1, min(number, max(bound, 1)) + 1) if number % d == 0)


class LineGate(nn.Module):
    """Convolution along a line, group norm, sigmoid. (B, C, L) → same, in (0, 1)."""

    def __init__(self, dim: int, kernel_size: int, conv_groups: int, norm_groups: int, bias: bool, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, kernel_size, padding=kernel_size // 2, groups=conv_groups, bias=bias, **dd)
        self.norm = nn.GroupNorm(norm_groups, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, L) → gates (B, C, L)."""
        return self.norm(self.conv(x)).sigmoid()


@register_notrace_module  # a leaf of FX graphs, as every module that is added to a network
class ELA(nn.Module):
    """Efficient local attention. (B, dim, Y, X) → same.

    Args:
        variant: ``"t"``, ``"b"``, ``"s"`` or ``"l"``: what the next three are unless given.
        kernel_size: of the convolution along a line, odd.
        conv_groups: of that convolution; ``dim`` is depth-wise. The variants' falls to the next divisor of ``dim``.
        norm_groups: of the group norm, likewise.
        shared: rows and columns go through the same convolution and norm, as published.
        bias: of the convolution.

    Raises: ValueError: unknown variant, an even kernel, or groups given that do not divide ``dim``.
    """

    def __init__(
        self,
        dim: int,
        variant: Variant = "b",
        *,
        kernel_size: int | None = None,
        conv_groups: int | None = None,
        norm_groups: int | None = None,
        shared: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if variant not in TABLE:
            raise ValueError(f"ELA: variant must be 't', 'b', 's' or 'l', got variant={variant!r}")
        kernel, channels, groups = TABLE[variant]
        kernel = kernel if kernel_size is None else kernel_size
        if kernel < 1 or kernel % 2 == 0:
            raise ValueError(f"ELA: kernel_size must be odd and positive, got kernel_size={kernel_size}")
        for name, given in (("conv_groups", conv_groups), ("norm_groups", norm_groups)):
            if given is not None and (given < 1 or dim % given):
                raise ValueError(f"ELA: {name} must divide dim={dim}, got {name}={given}")
        conv_groups = conv_groups or divisor_below(dim, dim // channels)
        norm_groups = norm_groups or divisor_below(dim, groups)
        self.rows = LineGate(dim, kernel, conv_groups, norm_groups, bias, **dd)
        self.columns = None if shared else LineGate(dim, kernel, conv_groups, norm_groups, bias, **dd)

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, Y, X) → same."""
        columns = self.rows if self.columns is None else self.columns
        return x * self.rows(x.mean(3))[:, :, :, None] * columns(x.mean(2))[:, :, None, :]


CARD = Card(
    family="ELA",
    paper="2403.01123",
    code="",
    license="",
    test="layers/test_ela.py",
)
ENTRIES = [Entry("ela", ELA, CARD("Gates of rows and columns from means along the other axis; T, B, S and L"))]
