"""FeatEnHancer: dark pictures made readable for a detector, learned from the detector's losses alone.

Paper: Hashmi et al., FeatEnHancer: Enhancing Hierarchical Features for Object Detection and Beyond Under Low-Light
Vision, ICCV 2023, arXiv 2308.03594. Official: https://github.com/khurramHashmi/FeatEnHancer,
``queryrcnn/featenhancer/feat_enhancer.py`` (CC BY-NC-ND 4.0: written here from the equations, nothing of it is used).

Same: three scales (the picture, a quarter, an eighth) through one feature network, attention over the first two in
blocks of three channels, eight residuals of three channels added to the picture; 139,400 parameters under mapped names.
The queries come from the quarter, as in the official code; the paper's text has both scales alike.

Different: no device in the constructor; pictures of one batch may differ in size and each gets what it gets alone;
pictures too small for the strides are refused by name. Residuals are added in the detector's normalized units, so that
`Enhanced` hands the detector pictures in [0, 1] or little beyond: nothing is clamped, as published.

Numbers are checked in ``tests/layers/test_featenhancer.py`` against a plain network. (B, 3, Y, X) → same.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core import weights
from attn_core.catalog import Card, Entry

SMALLEST = 15  # pixels: the quarter needs 7, the eighth 3 pixels of the quarter
BLOCK = 3  # channels that share one weight of the attention, and of one residual


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


class DarkFeatures(nn.Module):
    """Seven convolutions with mirrored skips, for every scale. (B, 3, Y, X) → (B, C, Y, X), before its ReLU."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.down = nn.ModuleList([_conv(3 if i == 0 else width, width) for i in range(4)])
        self.up = nn.ModuleList([_conv(2 * width, channels if i == 2 else width) for i in range(3)])

    def forward(self, x: Float[Tensor, "B 3 Y X"]) -> Float[Tensor, "B C Y X"]:
        """f₁ … f₄ in a chain; f₅ reads (f₃, f₄), f₆ (f₂, f₅), f₇ (f₁, f₆)."""
        kept = []
        for conv in self.down:
            x = F.relu(conv(x))
            kept.append(x)
        for conv, skip in zip(self.up[:2], (kept[2], kept[1]), strict=True):
            x = F.relu(conv(torch.cat([skip, x], 1)))
        return self.up[2](torch.cat([kept[0], x], 1))


class ScaleAwareAggregation(nn.Module):
    """Each block of each coarse cell chooses between two scales; the choice is added to the fine map.

    With a from the fine and b from the coarse map, both (B, n, 3, y, x), the softmax over the scores ⟨a, b⟩/√3 and
    ⟨b, b⟩/√3 is a sigmoid of their difference. The query is the coarse scale.

    Shapes: fine (B, C, Y, X), coarse (B, C, (Y−7)//4+1, (X−7)//4+1) → (B, C, Y, X).
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fine1 = nn.Conv2d(channels, channels, 7, stride=4)
        self.fine2 = nn.Conv2d(channels, channels, 3, stride=2)
        self.coarse = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, fine: Float[Tensor, "B C Y X"], coarse: Float[Tensor, "B C p q"]) -> Float[Tensor, "B C Y X"]:
        """Attention on the cells of the eighth, enlarged to the fine map."""
        a = self.fine2(self.fine1(fine)).unflatten(1, (-1, BLOCK))
        b = self.coarse(coarse).unflatten(1, (-1, BLOCK))
        share = torch.sigmoid(((a - b) * b).sum(2, keepdim=True) * BLOCK**-0.5)
        return fine + enlarge(torch.lerp(b, a, share.to(a.dtype)).flatten(1, 2), fine)


def enlarge(coarse: Float[Tensor, "B C p q"], like: Float[Tensor, "B K Y X"]) -> Float[Tensor, "B C Y X"]:
    """Bilinear, corners on corners, as the published network was trained."""
    return F.interpolate(coarse, size=(like.shape[2], like.shape[3]), mode="bilinear", align_corners=True)


class FeatEnHancer(nn.Module):
    """Enhances normalized pictures for whatever reads them next.

    Args:
        width: channels of the feature network.
        blocks: residuals of three channels that are added to the picture, and blocks of the attention.

    Shapes: (B, 3, Y, X) → (B, 3, Y, X); sides of at least 15 pixels, odd ones included.
    Raises: ValueError for a width or a number of blocks below 1; for pictures that are too small, not three channels
        deep or not floating-point numbers.
    """

    def __init__(self, *, width: int = 32, blocks: int = 8) -> None:
        super().__init__()
        for name, value in (("width", width), ("blocks", blocks)):
            if value < 1:
                raise ValueError(f"FeatEnHancer: {name} must be at least 1, got {name}={value}")
        channels = BLOCK * blocks
        self.quarter = nn.Conv2d(3, 3, 7, stride=4)
        self.eighth = nn.Conv2d(3, 3, 3, stride=2)
        self.features = DarkFeatures(width, channels)
        self.aggregation = ScaleAwareAggregation(channels)
        self.merge = _conv(2 * channels, width)
        self.residuals = _conv(width, channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, x: Float[Tensor, "B 3 Y X"]) -> Float[Tensor, "B 3 Y X"]:
        """The picture plus the sum of its residuals, each in (−1, 1)."""
        if x.ndim != 4 or x.shape[1] != 3 or not x.is_floating_point():
            raise ValueError(
                f"FeatEnHancer: pictures must be (B, 3, Y, X) floating-point numbers, got {tuple(x.shape)} {x.dtype}"
            )
        if min(x.shape[2:]) < SMALLEST:
            raise ValueError(
                f"FeatEnHancer: pictures must be at least {SMALLEST}×{SMALLEST} pixels, "
                f"got {x.shape[2]}×{x.shape[3]} (Y×X); enlarge them first"
            )
        quarter = self.quarter(x)
        eighth = self.features(self.eighth(quarter))  # without a ReLU, unlike the other two
        fine = self.aggregation(F.relu(self.features(x)), F.relu(self.features(quarter)))
        merged = self.merge(torch.cat([fine, enlarge(eighth, fine)], 1))
        return x + torch.tanh(self.residuals(merged)).unflatten(1, (-1, BLOCK)).sum(1)


class Enhanced(nn.Module):
    """A detector that sees enhanced pictures: any of this package or of torchvision, or one with ``mean`` and ``std``.

    Called as the detector is: the first argument are its pictures in [0, 1], a list of (3, Y, X) or a tensor
    (…, 3, Y, X); what else it takes and gives is handed through. Sizes stay as they are, so boxes do, too. The
    published detectors enhance what their loaders have resized: give pictures of that size for the same numbers.

    Args:
        detector: with ``transform.image_mean`` and ``image_std`` (torchvision), or ``mean`` and ``std``.
        enhancer: by default a new `FeatEnHancer`.
        mean, std: of the channels, where the detector does not say how it normalizes.

    Raises: ValueError for a detector that says nothing about its normalization, if mean and std are not given; for only
        one of them; for pictures as `FeatEnHancer`.
    """

    def __init__(
        self,
        detector: nn.Module,
        enhancer: nn.Module | None = None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            raise ValueError(f"Enhanced: give both mean and std or neither, got mean={mean}, std={std}")
        self.detector = detector
        self.enhancer = FeatEnHancer() if enhancer is None else enhancer
        center, scale = _normalization(detector) if mean is None else (mean, std)
        self.mean: Tensor
        self.std: Tensor
        for name, values in (("mean", center), ("std", scale)):
            self.register_buffer(name, torch.as_tensor(values).float().reshape(3, 1, 1).clone(), persistent=False)

    def forward(
        self, images: Sequence[Float[Tensor, "3 _ _"]] | Float[Tensor, "*B 3 Y X"], *inputs: Any, **options: Any
    ) -> Any:
        """What the detector gives for the enhanced pictures."""
        return self.detector(self.enhance(images), *inputs, **options)

    def enhance(self, images: Any) -> Any:
        """Pictures in [0, 1] → enhanced ones of the same sizes, not clamped; those of one size go through together."""
        if isinstance(images, Tensor):
            flat = images.flatten(0, -4) if images.ndim > 3 else images.unsqueeze(0)
            return self._enhanced(flat).reshape(images.shape)
        found: dict[int, Tensor] = {}
        sizes: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            sizes.setdefault(tuple(image.shape), []).append(index)
        for places in sizes.values():
            found |= zip(places, self._enhanced(torch.stack([images[i] for i in places])).unbind(0), strict=True)
        return [found[index] for index in range(len(images))]

    def _enhanced(self, images: Float[Tensor, "B 3 Y X"]) -> Float[Tensor, "B 3 Y X"]:
        mean, std = self.mean.to(images.dtype), self.std.to(images.dtype)
        return self.enhancer((images - mean) / std) * std + mean


def _normalization(detector: nn.Module) -> tuple[Any, Any]:
    """Mean and standard deviation by which a detector normalizes the channels of its pictures."""
    transform = getattr(detector, "transform", None)
    for owner, names in ((transform, ("image_mean", "image_std")), (detector, ("mean", "std"))):
        center, scale = (getattr(owner, name, None) for name in names)
        if center is not None and scale is not None:
            return center, scale
    raise ValueError(
        f"Enhanced: a {type(detector).__name__} does not say how it normalizes pictures "
        "(transform.image_mean and image_std, or mean and std); give mean and std"
    )


# ours → official
KEY_MAP = {
    "official": (
        (r"^quarter\.", "quarter_conv."),
        (r"^eighth\.", "hexa_conv."),
        *((rf"^features\.down\.{i}\.", f"e_conv{i + 1}.") for i in range(4)),
        *((rf"^features\.up\.{i}\.", f"e_conv{i + 5}.") for i in range(3)),
        (r"^aggregation\.fine([12])\.", r"scale_aware_aggregation.query_conv\1."),
        (r"^aggregation\.coarse\.", "scale_aware_aggregation.key_conv."),
        (r"^merge\.", "ue_conv8."),
        (r"^residuals\.", "ue_conv9."),
    )
}


def load_official(
    model: FeatEnHancer | Enhanced, source: Mapping[str, Any] | str | Path, *, ignore: Sequence[str] = ()
) -> FeatEnHancer | Enhanced:
    """Load the module of an official checkpoint, every parameter or none; of an `Enhanced` its detector stays.

    Args:
        source: a file, ``hf://owner/repo/file``, or what it holds: the module alone, or a detector that has it as
            ``feat_enhancer``. ignore: beginnings of our names that may differ.

    Raises: ValueError naming what is missing, unknown or of another shape.
    """
    own: Any = model.enhancer if isinstance(model, Enhanced) else model
    checkpoint = weights.read(source, prefixes=("module.", "feat_enhancer."))
    weights.fill(own, checkpoint, weights.fitting_names(own, KEY_MAP, checkpoint), ignore=ignore)
    return model


CARD = Card(
    family="FeatEnHancer",
    paper="2308.03594",
    code="https://github.com/khurramHashmi/FeatEnHancer",
    license="CC-BY-NC-ND-4.0",
    test="layers/test_featenhancer.py",
)
ENTRIES = [
    Entry(
        "featenhancer",
        FeatEnHancer,
        CARD("0.14 M parameters, before any detector: Enhanced(detector)", "ExDark mAP50 86.3, DARK FACE 69.0"),
    )
]
