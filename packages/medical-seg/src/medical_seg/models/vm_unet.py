"""VM-UNet: a U-shaped network of visual state-space blocks, each of which scans its map along four routes.

Paper: Ruan, Li, Xiang, VM-UNet: Vision Mamba UNet for Medical Image Segmentation, arXiv 2402.02491.
Official code: https://github.com/JCruan519/VM-UNet (Apache-2.0), models/vmunet/vmamba.py, vmunet.py.

Same: every layer and name, start values, skips that are added (none at the bottom), stochastic depth.
Differs: no compiled extension (`attn_core.selective_scan`); any number of channels (officially one channel is repeated
to three: `load_official` adds the weights up, which is the same); logits also for one class, where the official network
applies a sigmoid inside; sides that 32 does not divide are refused, officially odd maps are cropped.
Checked: tests/models/test_vm_unet.py, against a plain network with a loop over tokens; names by a round trip.

Shapes: (B, C, Y, X) with Y and X divisible by 32 → (B, K, Y, X) logits.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core import weights
from attn_core.catalog import Card, Entry
from medical_seg.layers.selective_scan_2d import StateSpaces, Walks, walk_both_ways

PATCH = 4
PREFIXES = ("module.", "_orig_mod.", "vmunet.")
Shallow, ShallowUp = (2, 2, 2, 2), (2, 2, 2, 1)
Deep, DeepUp = (2, 2, 9, 2), (2, 9, 2, 2)
Model = TypeVar("Model", bound="StateSpaceUNet")


class SS2D(StateSpaces):
    """A map scanned by rows and by columns, from both ends, between a convolution and a gate.

    Args:
        dim: C.
        states: numbers that each channel remembers.
        expand: inner channels are so many times C.

    Shapes: (B, Y, X, C) → same.
    """

    def __init__(self, dim: int, states: int = 16, expand: int = 2) -> None:
        inner = expand * dim
        super().__init__(inner, states, math.ceil(dim / 16))
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv2d = nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.out_norm = nn.LayerNorm(inner)
        self.out_proj = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Float[Tensor, "B Y X C"]) -> Float[Tensor, "B Y X C"]:
        """What four walks gather, normalized and gated."""
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


class Block(nn.Module):
    """x + mix(norm(x)), dropped for whole samples at random in training.

    Args:
        dim: C.
        mix: makes what mixes tokens from C.
        drop_path: how often the branch is dropped.
    """

    def __init__(self, dim: int, mix: Callable[[int], nn.Module], drop_path: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(dim)
        self.self_attention = mix(dim)
        self.drop_path = drop_path

    def forward(self, x: Float[Tensor, "B Y X C"]) -> Float[Tensor, "B Y X C"]:
        """The same shape."""
        found = self.self_attention(self.ln_1(x))
        if self.training and self.drop_path:
            keep = 1 - self.drop_path
            found = found * (torch.rand(len(x), 1, 1, 1, device=x.device) < keep) / keep
        return x + found


class PatchMerging(nn.Module):
    """Four neighbors to one token of twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Float[Tensor, "B Y X C"]) -> Float[Tensor, "B y x D"]:
        """Half the sides."""
        parts = [x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)]
        return self.reduction(self.norm(torch.cat(parts, -1)))


class PatchExpand(nn.Module):
    """A token to s² neighbors.

    Args:
        dim: channels of the input.
        scale: s.
        width: channels of each neighbor.
    """

    def __init__(self, dim: int, scale: int, width: int) -> None:
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(dim, scale**2 * width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "B y x C"]) -> Float[Tensor, "B Y X W"]:
        """s times the sides."""
        height, width = x.shape[1:3]
        x = self.expand(x).view(x.shape[0], height, width, self.scale, self.scale, -1).transpose(2, 3)
        return self.norm(x.reshape(x.shape[0], self.scale * height, self.scale * width, -1))


class Stage(nn.Module):
    """Blocks on one grid; an encoder's stage ends with ``downsample``, a decoder's begins with ``upsample``."""

    def __init__(
        self,
        dim: int,
        mix: Callable[[int], nn.Module],
        drop_path: Sequence[float],
        *,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, mix, rate) for rate in drop_path)
        self.downsample = PatchMerging(dim) if downsample else None
        self.upsample = PatchExpand(2 * dim, 2, dim) if upsample else None

    def forward(self, x: Float[Tensor, "B Y X C"]) -> Float[Tensor, "B y x D"]:
        """The map of the next stage."""
        if self.upsample is not None:
            x = self.upsample(x)
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class PatchEmbed(nn.Module):
    """Patches of 4×4 pixels to tokens."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, PATCH, PATCH)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B y x D"]:
        """A quarter of the sides, channels last."""
        return self.norm(self.proj(x).permute(0, 2, 3, 1))


class StateSpaceUNet(nn.Module):
    """The U of VM-UNet and of networks that differ in their blocks.

    Args:
        in_channels: C.
        out_channels: K, the number of classes with the background; 1 for logits of a foreground.
        mix: makes what mixes the tokens of a block from its channels.
        depths, depths_up: blocks of each stage, from the top down and from the bottom up.
        width: channels at the top; twice as many in each stage below.
        drop_path: of the last block of the encoder and of the first of the decoder; it falls linearly to 0 from there.

    Raises: ValueError for sizes that make no network.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        mix: Callable[[int], nn.Module],
        depths: Sequence[int],
        depths_up: Sequence[int],
        width: int,
        drop_path: float,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if in_channels < 1 or out_channels < 1:
            raise ValueError(
                f"{name}: in_channels and out_channels must be at least 1, got {in_channels} and {out_channels}"
            )
        if len(depths) != len(depths_up) or not depths or min(*depths, *depths_up) < 0:
            raise ValueError(f"{name}: depths {tuple(depths)} and depths_up {tuple(depths_up)} must be equally many")
        if width < PATCH or width % PATCH:
            raise ValueError(f"{name}: width={width} must be a multiple of {PATCH}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"{name}: drop_path must lie in [0, 1), got {drop_path}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        levels = len(depths)
        self.divisor = PATCH * 2 ** (levels - 1)
        dims = [width * 2**level for level in range(levels)]
        self.patch_embed = PatchEmbed(in_channels, width)
        down = torch.linspace(0, drop_path, sum(depths), device="cpu").split(list(depths))
        up = torch.linspace(drop_path, 0, sum(depths_up), device="cpu").split(list(depths_up))
        self.layers = nn.ModuleList(
            Stage(dim, mix, rates.tolist(), downsample=level < levels - 1)
            for level, (dim, rates) in enumerate(zip(dims, down, strict=True))
        )
        self.layers_up = nn.ModuleList(
            Stage(dim, mix, rates.tolist(), upsample=level > 0)
            for level, (dim, rates) in enumerate(zip(dims[::-1], up, strict=True))
        )
        self.final_up = PatchExpand(width, PATCH, width // PATCH)
        self.final_conv = nn.Conv2d(width // PATCH, out_channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B K Y X"]:
        """Logits.

        Raises: ValueError if the image has other channels or sides that the divisor does not divide.
        """
        self._check(x)
        x = self.patch_embed(x)
        skips = []
        for stage in self.layers:
            skips.append(x)
            x = stage(x)
        x = self.layers_up[0](x)
        for stage, skip in zip(self.layers_up[1:], skips[:0:-1], strict=True):
            x = stage(x + skip)
        return self.final_conv(self.final_up(x).permute(0, 3, 1, 2))

    def _check(self, x: Tensor) -> None:
        name = type(self).__name__
        if x.ndim != 4:
            raise ValueError(f"{name}: expected (B C Y X), got shape {tuple(x.shape)}")
        if x.shape[1] != self.in_channels:
            raise ValueError(f"{name}: the network reads {self.in_channels} channels, got {x.shape[1]}")
        if any(side % self.divisor or not side for side in x.shape[2:]):
            d = self.divisor
            padded = "×".join(str(max(d, -(-side // d) * d)) for side in x.shape[2:])
            raise ValueError(f"{name}: image {x.shape[2]}×{x.shape[3]} is not divisible by {d}; pad to {padded}")


class VMUNet(StateSpaceUNet):
    """Blocks scan by rows and by columns.

    Args:
        in_channels: C.
        out_channels: K, the number of classes with the background; 1 for logits of a foreground.
        depths, depths_up: blocks of each stage, from the top down and from the bottom up.
        width: channels at the top; twice as many in each stage below.
        states: numbers that each channel of a scan remembers.
        drop_path: of the deepest blocks; it falls linearly to 0.
    """

    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 1,
        *,
        depths: Sequence[int] = Shallow,
        depths_up: Sequence[int] = ShallowUp,
        width: int = 96,
        states: int = 16,
        drop_path: float = 0.2,
    ) -> None:
        mix = partial(SS2D, states=states)
        super().__init__(in_channels, out_channels, mix, depths, depths_up, width, drop_path)


def load_official(model: Model, source: Mapping[str, Any] | str | Path, *, ignore: Sequence[str] = ()) -> Model:
    """Copy an official state dict (VM-UNet's, MHS-VM's) into a network: every parameter or none.

    Weights of three input channels fit a network of one: it reads the picture that the official one repeats.

    Args:
        source: a file, ``hf://owner/repo/file``, or the state dict.
        ignore: beginnings of parameter names that may be missing or differ, such as ``("final_conv",)``.

    Raises: ValueError if the file cannot be read, or names or shapes do not fit; the message lists them.
    """
    checkpoint = weights.read(source, prefixes=PREFIXES)
    own = model.state_dict()
    # MHS-VM holds its parameters twice, and not the threshold of its fusion.
    tensors = {name: value for name, value in checkpoint.tensors.items() if not _is_alias(name)}
    tensors |= {name: value for name, value in own.items() if name.endswith("fusion.t") and name not in tensors}

    def fit(ours: str, value: Tensor) -> Tensor:
        repeated = ours == "patch_embed.proj.weight" and model.in_channels == 1 and value.shape[1] == 3
        return value.sum(1, keepdim=True) if repeated else value

    return weights.fill(model, replace(checkpoint, tensors=tensors), ignore=ignore, fit=fit)


def load_vmamba(model: VMUNet, source: Mapping[str, Any] | str | Path) -> VMUNet:
    """Start from VMamba's weights of ImageNet, as the authors do: its stages fill ours, and the decoder's in reverse.

    Args:
        model: of three channels and the official width.
        source: VMamba's checkpoint of early 2024 (``vmamba_small_e238_ema.pth``); it may have more blocks in a stage.

    Raises: ValueError if the file cannot be read, or a block of ours finds no weights of its shape.
    """
    checkpoint = weights.read(source)
    last = len(model.layers) - 1
    tensors: dict[str, Tensor] = {}
    for ours, value in model.state_dict().items():
        parts = ours.split(".")
        if parts[0] == "layers_up" and parts[2] == "blocks":
            theirs = ".".join(["layers", str(last - int(parts[1])), *parts[2:]])
        elif parts[0] in ("layers", "patch_embed"):
            theirs = ours
        else:
            tensors[ours] = value
            continue
        if theirs in checkpoint.tensors:
            tensors[ours] = checkpoint.tensors[theirs]
    return weights.fill(model, replace(checkpoint, tensors=tensors), caller="load_vmamba")


def _is_alias(name: str) -> bool:
    return ".scanning.seq2seq_engine." in name or name.endswith("mhs.x_ssproj_W")


CARD = Card(
    family="VM-UNet",
    paper="2402.02491",
    code="https://github.com/JCruan519/VM-UNet",
    license="Apache-2.0",
    test="models/test_vm_unet.py",
)
ENTRIES = [
    Entry("vm_unet", VMUNet, CARD("Eight encoder blocks, seven in the decoder, 2-D.")),
    Entry("vm_unet_deep", partial(VMUNet, depths=Deep, depths_up=DeepUp), CARD("Fifteen and fifteen blocks, 2-D.")),
    Entry(
        "test_vm_unet",
        partial(VMUNet, depths=(1, 1), depths_up=(1, 1), width=16, states=4),
        CARD("For tests."),
    ),
]
