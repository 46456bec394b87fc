"""ULSAM: one attention map for each group of channels, all groups in one pass.

Paper: Saini, Jha, Das, Mittal, Mohan, ULSAM: Ultra-Lightweight Subspace Attention Module for Compact Convolutional
Neural Networks, WACV 2020, arXiv 2006.15102. Official code: Nandan91/ULSAM, ``ulsam.py``, which holds the module alone.

The same: every number, with official weights through :func:`from_official`. What differs: the official module loops
over the groups with layers of their own; here their weights stand side by side, a depth-wise and a grouped convolution
do what the loop does. Importing this file sets no global state (the official one makes CUDA tensors the default).
``scale="area"`` weighs the map so that its mean is 1: with the published softmax over Y·X places it is about 1/(Y·X),
which changes a map of 56² by three parts in ten thousand until training makes it peaky.

Numbers are checked in ``tests/layers/test_subspace_attention.py`` against a loop over groups. (B, C, Y, X) → same.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from attn_core.catalog import Card, Entry

MOMENTUM = 0.9  # of the official batch norms: their statistics are nearly those of the last batch


@register_notrace_module  # a leaf of FX graphs, as every module that is added to a network
class ULSAM(nn.Module):
    """Subspace attention. (B, dim, Y, X) → same.

    Args:
        num_groups: subspaces; must divide ``dim``.
        scale: ``"one"``, as published, or ``"area"``: the map times its number of places.

    Raises: ValueError: groups that do not divide ``dim``, or an unknown scale.
    """

    def __init__(
        self,
        dim: int,
        num_groups: int = 4,
        *,
        scale: Literal["one", "area"] = "one",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if num_groups < 1 or dim % num_groups:
            raise ValueError(f"ULSAM: num_groups must divide dim={dim}, got num_groups={num_groups}")
        if scale not in ("one", "area"):
            raise ValueError(f"ULSAM: scale must be 'one' or 'area', got scale={scale!r}")
        self.num_groups = num_groups
        self.scale = scale
        self.conv_dws = nn.Conv2d(dim, dim, 1, groups=dim, **dd)
        self.bn_dws = nn.BatchNorm2d(dim, momentum=MOMENTUM, **dd)
        self.conv_point = nn.Conv2d(dim, num_groups, 1, groups=num_groups, **dd)
        self.bn_point = nn.BatchNorm2d(num_groups, momentum=MOMENTUM, **dd)

    def maps(self, x: Tensor) -> Tensor:
        """(B, dim, Y, X) → (B, num_groups, Y, X); each sums to 1, or to Y·X."""
        x = F.max_pool2d(self.bn_dws(self.conv_dws(x)).relu(), 3, stride=1, padding=1)
        maps = self.bn_point(self.conv_point(x)).relu().flatten(2).softmax(2).view(x.shape[0], -1, *x.shape[2:])
        return maps if self.scale == "one" else maps * (x.shape[2] * x.shape[3])

    def forward(self, x: Tensor) -> Tensor:
        """(B, dim, Y, X) → same."""
        return x + (x.unflatten(1, (self.num_groups, -1)) * self.maps(x)[:, :, None]).flatten(1, 2)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The official module's state dict (``subspaces.<group>.<layer>.<name>``) under our names, groups side by side.

    Raises: ValueError: names that are no groups' from 0 on.
    """
    groups: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        parts = name.split(".", 2)
        if len(parts) != 3 or parts[0] != "subspaces" or not parts[1].isdigit():
            raise ValueError(f"ULSAM.from_official: expected subspaces.<group>.<layer>.<name>, got {name!r}")
        groups.setdefault(parts[2], {})[int(parts[1])] = value
    ours = {}
    for name, values in groups.items():
        if sorted(values) != list(range(len(values))):
            raise ValueError(f"ULSAM.from_official: {name} stands in groups {sorted(values)}, not in all from 0 on")
        parts = [values[i] for i in range(len(values))]
        ours[name] = parts[0] if name.endswith("num_batches_tracked") else torch.cat(parts)
    return ours


CARD = Card(
    family="ULSAM",
    paper="2006.15102",
    code="https://github.com/Nandan91/ULSAM",
    license="",
    test="layers/test_subspace_attention.py",
)
ENTRIES = [Entry("ulsam", ULSAM, CARD("An attention map for each group of channels"))]
