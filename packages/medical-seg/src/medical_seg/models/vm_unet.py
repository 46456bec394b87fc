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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from attn_core import weights
from attn_core.catalog import Card, Entry
from medical_seg.layers.state_space.contract import AXES, CONVOLUTION
from medical_seg.layers.state_space.ss2d import SS2D

PATCH = 4
PREFIXES = ("module.", "_orig_mod.", "vmunet.")
Shallow, ShallowUp = (2, 2, 2, 2), (2, 2, 2, 1)
Deep, DeepUp = (2, 2, 9, 2), (2, 9, 2, 2)
Model = TypeVar("Model", bound="StateSpaceUNet")


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

    def forward(self, x: Float[Tensor, "B *grid C"]) -> Float[Tensor, "B *grid C"]:
        """The same shape."""
        found = self.self_attention(self.ln_1(x))
        if self.training and self.drop_path:
            keep = 1 - self.drop_path
            found = found * (torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < keep) / keep
        return x + found


class PatchMerging(nn.Module):
    """Two neighbors along each axis, four in a plane, to one token of twice the channels."""

    def __init__(self, dim: int, spatial_dims: int) -> None:
        super().__init__()
        together = 2**spatial_dims * dim
        self.norm = nn.LayerNorm(together)
        self.reduction = nn.Linear(together, 2 * dim, bias=False)

    def forward(self, x: Float[Tensor, "B *grid C"]) -> Float[Tensor, "B *half D"]:
        """Half the sides."""
        parts = []
        for starts in product((0, 1), repeat=x.ndim - 2):  # of the last axis first: rows run fastest
            parts.append(x[(slice(None), *(slice(start, None, 2) for start in starts[::-1]))])
        return self.reduction(self.norm(torch.cat(parts, -1)))


class PatchExpand(nn.Module):
    """A token to s neighbors along each axis, s² in a plane.

    Args:
        dim: channels of the input.
        scale: s.
        width: channels of each neighbor.
    """

    def __init__(self, dim: int, scale: int, width: int, spatial_dims: int) -> None:
        super().__init__()
        self.scale, self.width = scale, width
        self.expand = nn.Linear(dim, scale**spatial_dims * width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "B *grid C"]) -> Float[Tensor, "B *fine W"]:
        """s times the sides."""
        batch, *grid, _ = x.shape
        axes = len(grid)
        apart = self.expand(x).view(batch, *grid, *[self.scale] * axes, self.width)
        beside = [axis for place in range(1, axes + 1) for axis in (place, place + axes)]  # Y, s, X, s
        near = apart.permute(0, *beside, 2 * axes + 1)
        return self.norm(near.reshape(batch, *(self.scale * side for side in grid), self.width))


class Stage(nn.Module):
    """Blocks on one grid; an encoder's stage ends with ``downsample``, a decoder's begins with ``upsample``."""

    def __init__(
        self,
        dim: int,
        mix: Callable[[int], nn.Module],
        drop_path: Sequence[float],
        spatial_dims: int,
        *,
        downsample: bool = False,
        upsample: bool = False,
    ) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(dim, mix, rate) for rate in drop_path)
        self.downsample = PatchMerging(dim, spatial_dims) if downsample else None
        self.upsample = PatchExpand(2 * dim, 2, dim, spatial_dims) if upsample else None

    def forward(self, x: Float[Tensor, "B *grid C"]) -> Float[Tensor, "B *next D"]:
        """The map of the next stage."""
        if self.upsample is not None:
            x = self.upsample(x)
        for block in self.blocks:
            x = block(x)
        return x if self.downsample is None else self.downsample(x)


class PatchEmbed(nn.Module):
    """Patches, of 4×4 pixels in VM-UNet, to tokens."""

    def __init__(self, in_channels: int, dim: int, patch: int, spatial_dims: int) -> None:
        super().__init__()
        self.proj = CONVOLUTION[spatial_dims](in_channels, dim, patch, patch)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B *coarse D"]:
        """One token a patch, channels last."""
        return self.norm(self.proj(x).movedim(1, -1))


class StateSpaceUNet(nn.Module):
    """The U of VM-UNet and of networks that differ in their blocks.

    Args:
        in_channels: C.
        out_channels: K, the number of classes with the background; 1 for logits of a foreground.
        mix: makes what mixes the tokens of a block from its channels.
        depths, depths_up: blocks of each stage, from the top down and from the bottom up.
        width: channels at the top; twice as many in each stage below.
        drop_path: of the last block of the encoder and of the first of the decoder; it falls linearly to 0 from there.
        spatial_dims: axes of the image, 1 to 3.
        patch: side of the patches that become tokens.

    Shapes: (B, C, *grid) with sides that ``divisor`` divides → (B, K, *grid).
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
        *,
        spatial_dims: int = 2,
        patch: int = PATCH,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if spatial_dims not in CONVOLUTION or patch < 1:
            raise ValueError(
                f"{name}: spatial_dims must be 1, 2 or 3 and patch at least 1, got {spatial_dims} and {patch}"
            )
        if in_channels < 1 or out_channels < 1:
            raise ValueError(
                f"{name}: in_channels and out_channels must be at least 1, got {in_channels} and {out_channels}"
            )
        if len(depths) != len(depths_up) or not depths or min(*depths, *depths_up) < 0:
            raise ValueError(f"{name}: depths {tuple(depths)} and depths_up {tuple(depths_up)} must be equally many")
        if width < patch or width % patch:
            raise ValueError(f"{name}: width={width} must be a multiple of {patch}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"{name}: drop_path must lie in [0, 1), got {drop_path}")
        self.in_channels = in_channels
        self.out_channels = out_channels
        levels = len(depths)
        self.spatial_dims = spatial_dims
        self.divisor = patch * 2 ** (levels - 1)
        dims = [width * 2**level for level in range(levels)]
        self.patch_embed = PatchEmbed(in_channels, width, patch, spatial_dims)
        down = torch.linspace(0, drop_path, sum(depths), device="cpu").split(list(depths))
        up = torch.linspace(drop_path, 0, sum(depths_up), device="cpu").split(list(depths_up))
        self.layers = nn.ModuleList(
            Stage(dim, mix, rates.tolist(), spatial_dims, downsample=level < levels - 1)
            for level, (dim, rates) in enumerate(zip(dims, down, strict=True))
        )
        self.layers_up = nn.ModuleList(
            Stage(dim, mix, rates.tolist(), spatial_dims, upsample=level > 0)
            for level, (dim, rates) in enumerate(zip(dims[::-1], up, strict=True))
        )
        self.final_up = PatchExpand(width, patch, width // patch, spatial_dims)
        self.final_conv = CONVOLUTION[spatial_dims](width // patch, out_channels, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)

    def forward(self, x: Float[Tensor, "B C *grid"]) -> Float[Tensor, "B K *grid"]:
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
        return self.final_conv(self.final_up(x).movedim(-1, 1))

    def _check(self, x: Tensor) -> None:
        name = type(self).__name__
        if x.ndim != self.spatial_dims + 2:
            axes = " ".join(AXES.split()[-self.spatial_dims :])
            raise ValueError(f"{name}: expected (B C {axes}), got shape {tuple(x.shape)}")
        if x.shape[1] != self.in_channels:
            raise ValueError(f"{name}: the network reads {self.in_channels} channels, got {x.shape[1]}")
        if any(side % self.divisor or not side for side in x.shape[2:]):
            d = self.divisor
            padded = "×".join(str(max(d, -(-side // d) * d)) for side in x.shape[2:])
            image = "×".join(map(str, x.shape[2:]))
            raise ValueError(f"{name}: image {image} is not divisible by {d}; pad to {padded}")


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
