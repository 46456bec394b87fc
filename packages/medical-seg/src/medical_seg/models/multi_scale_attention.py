"""Multi-scale self-guided attention (MSA): position and channel attention at four scales, refined once more.

Paper: Sinha and Dolz, Multi-scale self-guided attention for medical image segmentation, IEEE JBHI 2020
(arXiv 1906.02849).
Official code: https://github.com/sinAshish/Multi-Scale-Attention (no license, no weights),
src/models/my_stacked_danet.py (``DAF_stack``), src/models/attention.py; losses and start values in src/main.py.

Same: every layer that is reached, the outputs in evaluation (mean of the four refined logits) and in training, the sum
of losses, the start values.
Differs: positions attend in tiles (officially eight maps of N×N per image); any timm backbone with maps at 1/4 to 1/32;
any number of channels and classes; the code that guides attention keeps its batch axis; first heads, which only the
loss reads, are not evaluated in prediction; the 955,412 parameters that the official forward never reaches exist only
with ``legacy``, to read and write official state dicts whole.
Checked: tests/models/test_multi_scale_attention.py, against a plain formulation with N×N maps; names by a round trip.

Shapes: (B, C, Y, X) with Y and X divisible by 16 → (B, K, Y, X) logits; in training a `GuidedOutput`.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core import weights
from attn_core.catalog import Card, Entry
from medical_seg.layers.dual_attention import ChannelAttention, PositionAttention

SCALES = 4
DIVISOR = 16
WHOLE_PREFIXES = ("module.", "_orig_mod.")


class GuidedOutput(NamedTuple):
    """What training reads; lists run over stages (2) × scales (4, fine to coarse).

    Attributes:
        logits: eight maps (B, K, Y, X); the first four from before any attention.
        codes: eight bottoms of the semantic modules (B, 512, Y/16, X/16).
        inputs: eight inputs of the semantic modules (B, 128, Y/4, X/4).
        reconstructions: eight of their outputs, of the same shape.
    """

    logits: list[Tensor]
    codes: list[Tensor]
    inputs: list[Tensor]
    reconstructions: list[Tensor]


class Down(nn.Sequential):
    """1×1 convolution, normalization, PReLU."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(nn.Conv2d(channels, width, 1), nn.BatchNorm2d(width), nn.PReLU())


class MultiConv(nn.Module):
    """Two 3×3 convolutions and one 1×1, each with normalization and PReLU."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.fuse_attn = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.PReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.PReLU(),
            nn.Conv2d(width, width, 1),
            nn.BatchNorm2d(width),
            nn.PReLU(),
        )

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B W Y X"]:
        """W features of each place, at the map's own resolution."""
        return self.fuse_attn(x)


class AttentionLayer(nn.Module):
    """Convolution to half the channels, attention between positions or channels, convolution."""

    def __init__(self, width: int, attend: nn.Module) -> None:
        super().__init__()
        self.attn = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.PReLU(),
            attend,
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.PReLU(),
        )

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B W Y X"]:
        """Half as many channels at the same resolution: 2·W = C."""
        return self.attn(x)


class SemanticModule(nn.Module):
    """Autoencoder of a scale's features: its code guides the second stage to what the first has seen."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.enc1 = self._block("encode", width, 2 * width, nn.MaxPool2d(2, 2))
        self.enc2 = self._block("encode", 2 * width, 4 * width, nn.MaxPool2d(2, 2))
        self.dec2 = self._block("decode", 4 * width, 2 * width, nn.ConvTranspose2d(2 * width, 2 * width, 2, 2))
        self.dec1 = self._block("decode", 2 * width, width, nn.ConvTranspose2d(width, width, 2, 2))

    @staticmethod
    def _block(name: str, channels: int, width: int, last: nn.Module) -> nn.ModuleDict:
        layers = [
            nn.Conv2d(channels, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            last,
        ]
        return nn.ModuleDict({name: nn.Sequential(*layers)})

    def forward(self, x: Float[Tensor, "B C Y X"]) -> tuple[Float[Tensor, "B D y x"], Float[Tensor, "B C Y X"]]:
        """Code at a quarter of the grid, reconstruction."""
        code = self.enc2["encode"](self.enc1["encode"](x))
        return code, self.dec1["decode"](self.dec2["decode"](code))


class GuidedStage(nn.Module):
    """One pass of attention over the four scales; one semantic module serves them all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.semantic = SemanticModule(2 * width)
        self.position = nn.ModuleList(AttentionLayer(width, PositionAttention(width, 2)) for _ in range(SCALES))
        self.channel = nn.ModuleList(AttentionLayer(width, ChannelAttention("danet")) for _ in range(SCALES))
        self.guide = nn.ModuleList(nn.Conv2d(2 * width, width, 3, padding=1) for _ in range(SCALES))
        self.project = nn.ModuleList(nn.Conv2d(width, width, 1) for _ in range(SCALES))

    def forward(self, scale: int, x: Float[Tensor, "B C Y X"]) -> tuple[Tensor, Tensor, Tensor]:
        """Attended features, code and reconstruction of one scale."""
        code, reconstruction = self.semantic(x)
        attended = self.position[scale](x) + self.channel[scale](x)
        return self.project[scale](attended * self.guide[scale](reconstruction)), code, reconstruction


class MultiScaleAttention(nn.Module):
    """ResNeXt features at four scales, fused, attended twice.

    Args:
        in_channels: C.
        out_channels: K, the number of classes with the background.
        backbone: a timm model with maps at 1/4, 1/8, 1/16 and 1/32.
        width: channels of all maps after the backbone; officially 64.
        pretrained: load timm's weights of the backbone (needs them on this machine or a network).
        legacy: also hold the official modules that nothing calls, for whole state dicts.

    Raises: ValueError for an unknown backbone, one without those four maps, or sizes that make no network.
    """

    def __init__(
        self,
        in_channels: int = 1,
        out_channels: int = 5,
        *,
        backbone: str = "resnext101_32x8d",
        width: int = 64,
        pretrained: bool = False,
        legacy: bool = False,
    ) -> None:
        super().__init__()
        if in_channels < 1 or out_channels < 1:
            raise ValueError(
                "MultiScaleAttention: in_channels and out_channels must be at least 1, "
                f"got {in_channels} and {out_channels}"
            )
        self.in_channels = in_channels
        self.out_channels = out_channels
        self.backbone, channels = _features(backbone, in_channels, pretrained)
        self.down = nn.ModuleList(Down(count, width) for count in channels)
        self.fuse = MultiConv(SCALES * width, width)
        self.stages = nn.ModuleList(GuidedStage(width) for _ in range(2))
        self.heads = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(width, out_channels, 1) for _ in range(SCALES)) for _ in range(2)
        )
        self.unused = _unused_modules(width) if legacy else None
        kept = set(self.backbone.modules()) if pretrained else set()
        for module in self.modules():
            if module not in kept:
                _initialize(module)

    @property
    def divisor(self) -> int:
        """Both sides of an image must be multiples of this."""
        return DIVISOR

    def forward(self, x: Float[Tensor, "B C Y X"]) -> Float[Tensor, "B K Y X"] | GuidedOutput:
        """Mean of the four refined logits; in training everything that `guided_loss` reads.

        Raises: ValueError if the image has other channels or sides that 16 does not divide.
        """
        self._check(x)
        size = x.shape[2:]
        maps = self.backbone(x)
        grid = maps[0].shape[2:]
        down = [_resized(project(features), grid) for project, features in zip(self.down, maps, strict=True)]
        fused = self.fuse(torch.cat(down[::-1], 1))
        codes, inputs, reconstructions = [], [], []
        guided = [fused] * SCALES
        attended: list[Tensor] = []
        for stage in self.stages:
            # Coarse to fine, as officially: running statistics of the shared semantic module depend on the order.
            results = []
            for scale in reversed(range(SCALES)):
                joined = torch.cat([down[scale], guided[scale]], 1)
                results.append((joined, *stage(scale, joined)))
            results.reverse()
            attended = [features for _, features, _, _ in results]
            inputs += [joined for joined, _, _, _ in results]
            codes += [code for _, _, code, _ in results]
            reconstructions += [reconstruction for _, _, _, reconstruction in results]
            guided = [features * fused for features in attended]
        refined = [head(features) for head, features in zip(self.heads[1], attended, strict=True)]  # pyright: ignore[reportArgumentType]
        if not self.training:
            return _resized(torch.stack(refined).mean(0), size)  # resizing is linear: once for the mean
        first = [head(features) for head, features in zip(self.heads[0], down, strict=True)]  # pyright: ignore[reportArgumentType]
        return GuidedOutput([_resized(logits, size) for logits in (*first, *refined)], codes, inputs, reconstructions)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 4:
            raise ValueError(f"MultiScaleAttention: expected (B C Y X), got shape {tuple(x.shape)}")
        if x.shape[1] != self.in_channels:
            raise ValueError(f"MultiScaleAttention: the network reads {self.in_channels} channels, got {x.shape[1]}")
        if any(side % DIVISOR or not side for side in x.shape[2:]):
            padded = "×".join(str(max(DIVISOR, -(-side // DIVISOR) * DIVISOR)) for side in x.shape[2:])
            raise ValueError(
                f"MultiScaleAttention: image {x.shape[2]}×{x.shape[3]} is not divisible by {DIVISOR}; pad to {padded}"
            )


def guided_loss(
    output: GuidedOutput,
    target: Int[Tensor, "B Y X"],
    *,
    segmentation: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    guide_weight: float = 0.25,
    reconstruction_weight: float = 0.1,
) -> dict[str, Tensor]:
    """The losses of the official script: eight segmentations, four pairs of codes, eight reconstructions.

    Args:
        output: of the network in training.
        target: class of each pixel.
        segmentation: (logits, target) → scalar; officially the cross-entropy.
        guide_weight: of the squared differences between the codes of both stages.
        reconstruction_weight: of the squared errors of the semantic modules; their inputs receive gradients too.

    Returns:
        ``loss_segmentation``, ``loss_guide``, ``loss_reconstruction``, already weighted.
    """
    first, second = output.codes[:SCALES], output.codes[SCALES:]
    pairs = zip(output.inputs, output.reconstructions, strict=True)
    guide = torch.stack([F.mse_loss(a, b) for a, b in zip(first, second, strict=True)]).sum()
    reconstruction = torch.stack([F.mse_loss(a, b) for a, b in pairs]).sum()
    return {
        "loss_segmentation": torch.stack([segmentation(logits, target) for logits in output.logits]).sum(),
        "loss_guide": guide_weight * guide,
        "loss_reconstruction": reconstruction_weight * reconstruction,
    }


def from_official(state: Mapping[str, Tensor], *, legacy: bool = False) -> dict[str, Tensor]:
    """Rename an official state dict.

    Args:
        state: of ``DAF_stack``.
        legacy: keep the modules that nothing calls, for a network built with ``legacy``.

    Raises: ValueError for a name that the official network does not have.
    """
    renamed = {}
    for name, value in state.items():
        ours = _our_name(name)
        if legacy or not ours.startswith("unused."):
            renamed[ours] = value
    return renamed


def load_official(
    model: MultiScaleAttention, source: Mapping[str, Any] | str | Path, *, ignore: Sequence[str] = ()
) -> MultiScaleAttention:
    """Copy an official state dict into a network: every parameter or none.

    Args:
        source: a file, ``hf://owner/repo/file``, or the state dict of ``DAF_stack``.
        ignore: beginnings of our parameter names that may be missing or differ, such as ``("heads",)``.

    Raises: ValueError if the file cannot be read, or names or shapes do not fit; the message lists them.
    """

    def find(official: str) -> str | None:
        try:
            ours = _our_name(official)
        except ValueError:
            return official  # listed as unexpected
        return None if ours.startswith("unused.") and model.unused is None else ours

    return weights.fill(model, weights.read(source, prefixes=WHOLE_PREFIXES), find, ignore=ignore)


# Officially the last index of conv_sem and conv8 counts scales from coarse to fine, all others from fine to coarse.
_PATTERNS: list[tuple[str, Callable[[re.Match[str]], str]]] = [
    (r"resnext\.layer0\.0\.", lambda _: "backbone.conv1."),
    (r"resnext\.layer0\.1\.", lambda _: "backbone.bn1."),
    (r"resnext\.layer1\.1\.", lambda _: "backbone.layer1."),
    (r"resnext\.layer([234])\.", lambda m: f"backbone.layer{m[1]}."),
    (r"down(\d)\.", lambda m: f"down.{int(m[1]) - 1}."),
    (r"fuse1\.", lambda _: "fuse."),
    (r"semanticModule_(\d)_1\.", lambda m: f"stages.{int(m[1]) - 1}.semantic."),
    (r"pam_attention_(\d)_(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.position.{int(m[2]) - 1}."),
    (r"cam_attention_(\d)_(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.channel.{int(m[2]) - 1}."),
    (r"conv_sem_(\d)_(\d)\.", lambda m: f"stages.{int(m[1]) - 1}.guide.{SCALES - int(m[2])}."),
    (r"conv8_([1-4])\.", lambda m: f"stages.0.project.{SCALES - int(m[1])}."),
    (r"conv8_1([1-4])\.", lambda m: f"stages.1.project.{SCALES - int(m[1])}."),
    (r"predict(\d)\.", lambda m: f"heads.0.{int(m[1]) - 1}."),
    (r"predict(\d)_2\.", lambda m: f"heads.1.{int(m[1]) - 1}."),
    (r"((?:conv[67]_|attention|refine)\d\.)", lambda m: f"unused.{m[1]}"),
]


def _our_name(name: str) -> str:
    for pattern, ours in _PATTERNS:
        if match := re.match(pattern, name):
            return ours(match) + name[match.end() :]
    raise ValueError(f"from_official: the official network has no {name!r}; is this a state dict of DAF_stack?")


def _features(backbone: str, in_channels: int, pretrained: bool) -> tuple[nn.Module, list[int]]:
    try:
        import timm
    except ImportError as error:
        raise ValueError("MultiScaleAttention: its backbones are timm's; pip install 'medical-seg[smp]'") from error
    if not timm.is_model(backbone):
        raise ValueError(f"MultiScaleAttention: timm has no model backbone={backbone!r}; see timm.list_models()")
    everything: Any = timm.create_model(backbone, features_only=True, in_chans=in_channels, pretrained=False)
    reductions = everything.feature_info.reduction()
    if reductions[-SCALES:] != [4, 8, 16, 32]:
        raise ValueError(f"MultiScaleAttention: backbone={backbone!r} has maps at 1/{reductions}, not at 1/4 to 1/32")
    chosen = tuple(range(len(reductions) - SCALES, len(reductions)))
    model: Any = timm.create_model(
        backbone, features_only=True, in_chans=in_channels, out_indices=chosen, pretrained=pretrained
    )
    return model, model.feature_info.channels()


def _unused_modules(width: int) -> nn.ModuleDict:
    modules: dict[str, nn.Module] = {}
    for scale in range(1, SCALES + 1):
        for level in (6, 7):
            modules[f"conv{level}_{scale}"] = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(width, width, 1))
        modules[f"attention{scale}"] = MultiConv(2 * width, width)
        modules[f"attention{scale}"].fuse_attn[8] = nn.Softmax2d()  # pyright: ignore[reportArgumentType, reportIndexIssue]
        modules[f"refine{scale}"] = MultiConv(2 * width, width)
    return nn.ModuleDict(modules)


def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_normal_(module.weight)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)


def _resized(x: Tensor, size: torch.Size) -> Tensor:
    if x.shape[2:] == size:
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


CARD = Card(
    family="MSA",
    paper="1906.02849",
    code="https://github.com/sinAshish/Multi-Scale-Attention",
    license="",
    test="models/test_multi_scale_attention.py",
)
ENTRIES = [
    Entry("msa", MultiScaleAttention, CARD("Two passes of attention over four scales of ResNeXt-101, 2-D.")),
    Entry("msa_resnet18", partial(MultiScaleAttention, backbone="resnet18"), CARD("The same over ResNet-18, 2-D.")),
    Entry("test_msa", partial(MultiScaleAttention, backbone="test_efficientnet", width=8), CARD("For tests.")),
]
