"""MHS-VM: VM-UNet whose blocks scan in several heads, each along routes of its own, and fuse routes by their variation.

Paper: Ji, MHS-VM: Multi-Head Scanning in Parallel Subspaces for Vision Mamba, arXiv 2406.05992.
Official code: https://github.com/PixDeep/MHS-VM (Apache-2.0), models/vmunet/mhsm.py, vmamba.py, vmunet.py and
scanutils.py.

Same: every layer and name, the orders of all routes, the fusion (no learned weights), start values.
Differs: routes of any grid (officially tables of 256² from a file); all heads are scanned in one call; the fusion's
threshold stands in the checkpoint (officially in the settings, and the test script takes another); otherwise as VM-
UNet. Parameters that official checkpoints hold twice are read once.
Checked: tests/models/test_mhs_vm.py, against a plain network with a loop over tokens; names by a round trip.

Shapes: (B, C, Y, X) with Y and X divisible by 32 → (B, K, Y, X) logits.
"""

import math
from collections.abc import Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core.catalog import Card, Entry
from medical_seg.layers.scan_routes import PATTERNS, route_tables
from medical_seg.layers.selective_scan_2d import StateSpaces, Walks, walk_both_ways
from medical_seg.models.vm_unet import Deep, DeepUp, Shallow, ShallowUp, StateSpaceUNet


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
        heads: 3 for routes C, X, S; 4 for Z, too. See `medical_seg.layers.scan_routes`.
        states: numbers that each channel remembers.
        threshold: of the fusion.
    """

    def __init__(self, dim: int, heads: int, states: int, threshold: float) -> None:
        super().__init__()
        self.patterns = PATTERNS[:heads]
        width = dim // heads
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
        parts = self.x_ssproj(x).flatten(1, 2).transpose(1, 2).unflatten(1, (heads, -1))
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

    Shapes: (B, Y, X, C) → same.
    """

    def __init__(self, dim: int, heads: int, states: int, threshold: float) -> None:
        super().__init__()
        self.in_proj = nn.Linear(dim, 2 * dim, bias=False)
        self.conv2d = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.mhs = MultiHeadScan(dim, heads, states, threshold)
        self.out_norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "B Y X C"]) -> Float[Tensor, "B Y X C"]:
        """What the heads gather, normalized and gated."""
        x, gate = self.in_proj(x).chunk(2, -1)
        x = F.silu(self.conv2d(x.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return self.out_norm(self.mhs(x)) * F.silu(gate)


class MHSVM(StateSpaceUNet):
    """Blocks scan in heads.

    Args:
        in_channels: C.
        out_channels: K, the number of classes with the background; 1 for logits of a foreground.
        heads: 3 or 4.
        threshold: of the fusion: 0.5 for ISIC 2018 and 0 for ISIC 2017 in the authors' settings, 0.4 in their test
            script. A loaded checkpoint of ours brings its own.
        depths, depths_up: blocks of each stage, from the top down and from the bottom up.
        width: channels at the top; twice as many in each stage below.
        states: numbers that each channel of a scan remembers.
        drop_path: of the deepest blocks; it falls linearly to 0.

    Raises: ValueError for another number of heads.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        *,
        heads: int = 4,
        threshold: float = 0.5,
        depths: Sequence[int] = Shallow,
        depths_up: Sequence[int] = ShallowUp,
        width: int = 96,
        states: int = 16,
        drop_path: float = 0.2,
    ) -> None:
        if heads not in (3, 4):
            raise ValueError(f"MHSVM: heads must be 3 or 4, got heads={heads}")
        mix = partial(GatedScan, heads=heads, states=states, threshold=threshold)
        super().__init__(in_channels, out_channels, mix, depths, depths_up, width, drop_path)


CARD = Card(
    family="MHS-VM",
    paper="2406.05992",
    code="https://github.com/PixDeep/MHS-VM",
    license="Apache-2.0",
    test="models/test_mhs_vm.py",
)
ENTRIES = [
    Entry("mhs_vm", MHSVM, CARD("Four heads, eight and seven blocks, 2-D.", "DSC 89.4 % (ISIC 2018)")),
    Entry("mhs_vm_3h", partial(MHSVM, heads=3), CARD("Three heads, eight and seven blocks, 2-D.")),
    Entry(
        "mhs_vm_deep",
        partial(MHSVM, depths=Deep, depths_up=DeepUp),
        CARD("Four heads, fifteen and fifteen blocks, 2-D."),
    ),
    Entry(
        "mhs_vm_3h_deep",
        partial(MHSVM, heads=3, depths=Deep, depths_up=DeepUp),
        CARD("Three heads, fifteen and fifteen blocks, 2-D."),
    ),
    Entry(
        "test_mhs_vm",
        partial(MHSVM, depths=(1, 1), depths_up=(1, 1), width=16, states=4, threshold=0.0),
        CARD("For tests."),
    ),
]
