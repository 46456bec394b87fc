"""FocalNet: every token is modulated by a context gathered from growing neighborhoods and the whole map.

Paper: Yang et al., Focal Modulation Networks, NeurIPS 2022, arXiv 2203.11926. Official code: microsoft/FocalNet,
``classification/focalnet.py`` and ``configs/*.yaml``. timm has the model as ``focalnet_*``; its parameters have the
names used here, but for ``layers`` (here ``stages``) and 1×1 convolutions (here linear layers).

The same as there: every number. Gates are raw outputs of a linear layer; the global context passes a GELU after the
mean.

What differs: token maps stay channels-last; the pyramid of convolutions is one operator of attn_core, which keeps none
of its maps for the backward pass, and nothing is stored on modules in forward. ``large_fl4`` divides the modulator by
the number of levels, as the official recipe, FocalNet-DINO and PaddleDetection do and timm does not:
``normalize_modulator=False`` gives timm's numbers. ``base_iso`` has the norm in its modulation that the released file
has and the official registry forgets. ``pad_odd`` pads odd maps, as the official detection code; otherwise their last
row is dropped.

Numbers are checked in ``tests/models/test_focalnet.py`` against timm.

Shapes: image (B, 3, Y, X) → logits (B, num_classes); maps (B, C_i, Y/s, X/s), rounded as ``pad_odd`` says.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, LayerScale
from timm.models import generate_default_cfgs, register_notrace_function
from torch import Tensor, nn

from attn_core import focal_modulation
from attn_core.catalog import Card
from attn_core.weights import KeyMap
from vision_models.backbone import Dense, Stage, StagedBackbone
from vision_models.layers.token_maps import Linear, Mlp, init_linear, pad_map
from vision_models.registration import STAGES, pretrained_cfg, timm_entries

__all__ = ["FocalNet", "FocalNetDense"]

EPS = 1e-5
FOCAL_FACTOR = 2  # growth of the kernels from level to level


@register_notrace_function
def modulator(ctx: Tensor, gates: Tensor, weights: list[Tensor], normalize: bool) -> Tensor:
    """The gated context: ctx (B, Y, X, C), gates (B, Y, X, L + 1) → (B, Y, X, C)."""
    ctx, gates = ctx.permute(0, 3, 1, 2), gates.permute(0, 3, 1, 2)
    out = focal_modulation(ctx, gates, weights, normalize=normalize)
    return out.permute(0, 2, 3, 1)


class FocalModulation(nn.Module):
    """q ∘ h(context), where the context is gathered and gated level by level (eq. 4–6). (B, Y, X, dim) → same."""

    def __init__(
        self, dim: int, focal_level: int, focal_window: int, normalize_modulator: bool, post_norm: bool, **dd: Any
    ) -> None:
        super().__init__()
        self.dim = dim
        self.normalize_modulator = normalize_modulator
        self.f = Linear(dim, 2 * dim + focal_level + 1, **dd)
        self.h = Linear(dim, dim, **dd)
        kernels = [focal_window + FOCAL_FACTOR * level for level in range(focal_level)]
        self.focal_layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(dim, dim, k, padding=k // 2, groups=dim, bias=False, **dd)) for k in kernels
        )
        self.norm = nn.LayerNorm(dim, eps=EPS, **dd) if post_norm else nn.Identity()
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        projected = self.f(x)
        q, ctx, gates = (
            projected[..., : self.dim],
            projected[..., self.dim : 2 * self.dim],
            projected[..., 2 * self.dim :],
        )
        weights: list[Tensor] = [layer[0].weight for layer in self.focal_layers]  # pyright: ignore[reportIndexIssue]
        context = self.h(modulator(ctx, gates, weights, self.normalize_modulator))
        return self.proj(self.norm(q * context))


class Block(nn.Module):
    """Modulation, MLP, each with a residual; norms before, or with ``post_norm`` behind. (B, Y, X, dim) → same."""

    def __init__(
        self,
        dim: int,
        modulation: nn.Module,
        *,
        mlp_ratio: float,
        post_norm: bool,
        layerscale_value: float | None,
        drop_path: float,
        **dd: Any,
    ) -> None:
        super().__init__()

        def norm(wanted: bool) -> nn.Module:
            return nn.LayerNorm(dim, eps=EPS, **dd) if wanted else nn.Identity()

        def scale() -> nn.Module:
            return nn.Identity() if layerscale_value is None else LayerScale(dim, layerscale_value, **dd)

        def path() -> nn.Module:
            return DropPath(drop_path) if drop_path > 0 else nn.Identity()

        self.norm1, self.modulation, self.norm1_post = norm(not post_norm), modulation, norm(post_norm)
        self.ls1, self.drop_path1 = scale(), path()
        self.norm2, self.mlp, self.norm2_post = (
            norm(not post_norm),
            Mlp(dim, int(dim * mlp_ratio), **dd),
            norm(post_norm),
        )
        self.ls2, self.drop_path2 = scale(), path()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.norm1_post(self.modulation(self.norm1(x)))))
        return x + self.drop_path2(self.ls2(self.norm2_post(self.mlp(self.norm2(x)))))


class Downsample(nn.Module):
    """Patches, or overlapping windows, become tokens, then a norm. (B, C, Y, X) → (B, dim, Y/s, X/s)."""

    def __init__(
        self, in_dim: int, dim: int, stride: int, overlap: bool, pad_odd: bool, stem_padding: int = 0, **dd: Any
    ) -> None:
        super().__init__()
        kernel, padding = (stride, 0) if not overlap else (7, stem_padding) if stride == 4 else (3, 1)
        self.multiple = stride if pad_odd else 1
        self.proj = nn.Conv2d(in_dim, dim, kernel, stride=stride, padding=padding, **dd)
        self.norm = LayerNorm2d(dim, eps=EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(pad_map(x, self.multiple)))


class FocalNet(StagedBackbone):
    """The classification network and, through timm's feature interfaces, a backbone for any resolution.

    Args:
        depths: blocks per stage; one entry makes the isotropic network, where each block is a stage to take maps from.
        embed_dim: width of the first stage; each stage doubles it.
        patch_size: stride of the stem, 16 for the isotropic network.
        focal_levels, focal_windows: number of depthwise convolutions, and side of the first, one value or one per
            stage; kernels grow by 2 from level to level.
        overlap_down: overlapping windows in stem and downsampling (the large models).
        post_norm: norms behind modulation and MLP instead of before.
        post_norm_in_modulation: one more norm before the output projection of the modulation.
        normalize_modulator: divide the context by the number of levels.
        layerscale_value: start of the learned scale of each residual branch; None for none.
        pad_odd: pad maps to a multiple of the stride instead of dropping their last rows and columns.
        stem_padding: of overlapping 7×7 windows, on each side: 2, but 3 in the official dense code.

    Raises:
        ValueError: options that contradict each other.
    """

    undecayed = (".gamma",)

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        embed_dim: int = 96,
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        patch_size: int = 4,
        mlp_ratio: float = 4.0,
        focal_levels: int | Sequence[int] = 2,
        focal_windows: int | Sequence[int] = 3,
        overlap_down: bool = False,
        post_norm: bool = False,
        post_norm_in_modulation: bool = False,
        normalize_modulator: bool = False,
        layerscale_value: float | None = None,
        pad_odd: bool = False,
        stem_padding: int = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        isotropic = len(depths) == 1
        depths = (1,) * depths[0] if isotropic else tuple(depths)
        stages_wanted = len(depths)
        levels = (focal_levels,) * stages_wanted if isinstance(focal_levels, int) else tuple(focal_levels)
        windows = (focal_windows,) * stages_wanted if isinstance(focal_windows, int) else tuple(focal_windows)
        for option, values in (("focal_levels", levels), ("focal_windows", windows)):
            if len(values) != stages_wanted:
                raise ValueError(
                    f"FocalNet: {option} must have one entry for each of {stages_wanted} stages, got {values}"
                )
        if min(levels) < 0:
            raise ValueError(f"FocalNet: focal_levels must not be negative, got focal_levels={levels}")
        if any(window < 1 or window % 2 == 0 for window in windows):
            raise ValueError(f"FocalNet: focal_windows must be odd, got focal_windows={windows}")
        if stem_padding not in (2, 3):
            raise ValueError(f"FocalNet: stem_padding must be 2 or 3, got stem_padding={stem_padding}")
        if patch_size < 1 or (overlap_down and patch_size != 4):
            raise ValueError(f"FocalNet: patch_size must be 4 with overlap_down, else positive, got {patch_size}")

        self.num_classes = num_classes
        self.in_chans = in_chans
        dims = [embed_dim << (0 if isotropic else i) for i in range(stages_wanted)]
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = []
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()

        def block(i: int) -> Block:
            modulation = FocalModulation(
                dims[i], levels[i], windows[i], normalize_modulator, post_norm_in_modulation, **dd
            )
            options: dict[str, Any] = {"mlp_ratio": mlp_ratio, "post_norm": post_norm, **dd}
            return Block(dims[i], modulation, layerscale_value=layerscale_value, drop_path=rates.pop(0), **options)

        last = patch_size if isotropic else patch_size << (stages_wanted - 1)
        self.min_side = 1 if pad_odd else 7 - 2 * stem_padding if overlap_down else last
        self.stem = Downsample(in_chans, dims[0], patch_size, overlap_down, pad_odd, stem_padding, **dd)
        stages: list[nn.Module] = []
        for i, depth in enumerate(depths):
            shrinks = i > 0 and not isotropic
            downsample = Downsample(dims[i - 1], dims[i], 2, overlap_down, pad_odd, **dd) if shrinks else nn.Identity()
            stages.append(Stage(downsample, [block(i) for _ in range(depth)]))
            reduction = patch_size if isotropic else patch_size << i
            self.feature_info.append({"num_chs": dims[i], "reduction": reduction, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(dims[-1], eps=EPS, **dd)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.apply(init_linear)


class FocalNetDense(Dense, FocalNet):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Backbone for detection and segmentation: four maps, each with a LayerNorm of its own on the way out.

    Args:
        variant: name of the classification variant to start from; ``options`` override its constructor arguments (the
            official recipes: ``focal_windows=9`` or ``(11, 9, 9, 7)``). ``pad_odd=True`` and ``stem_padding=3``, as
            there, unless given.

    Shapes: image (B, 3, Y, X) → tuple of (B, C_i, ⌈Y/s⌉, ⌈X/s⌉), s = 4, 8, 16, 32.
    Raises: ValueError for an unknown variant.
    """

    out_eps = EPS

    def __init__(self, variant: str = "focalnet_tiny_srf", **options: Any) -> None:
        super().__init__(variant, **{"pad_odd": True, "stem_padding": 3, **options})


_OFFICIAL_ENDINGS = (
    (r"\.ls(\d)\.gamma$", r".gamma_\1"),
    (r"\.norm(\d)_post\.", r".norm\1."),
    (r"\.modulation\.norm\.", ".modulation.ln."),
    (r"^head\.fc\.", "head."),
)
KEY_MAP: KeyMap = {
    "focalnet": (
        (r"^stem\.", "patch_embed."),
        # the official stage ends with the downsampling that ours begins with
        (r"^stages\.1\.downsample\.", "layers.0.downsample."),
        (r"^stages\.2\.downsample\.", "layers.1.downsample."),
        (r"^stages\.3\.downsample\.", "layers.2.downsample."),
        (r"^stages\.", "layers."),
        (r"^out_norms\.(\d)\.", r"norm\1."),
        *_OFFICIAL_ENDINGS,
    ),
    "isotropic": (
        (r"^stem\.", "patch_embed."),
        (r"^stages\.(\d+)\.blocks\.0\.", r"layers.0.blocks.\1."),
        *_OFFICIAL_ENDINGS,
    ),
    "timm": ((r"^stages\.", "layers."),),
}
FocalNet.key_map = KEY_MAP

_LARGE = {"depths": (2, 2, 18, 2), "overlap_down": True, "post_norm": True, "layerscale_value": 1e-4}
_HUGE = {**_LARGE, "embed_dim": 352, "post_norm_in_modulation": True}
_ISO = {"depths": (12,), "patch_size": 16, "focal_levels": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "focalnet_tiny_srf": {},
    "focalnet_tiny_lrf": {"focal_levels": 3},
    "focalnet_small_srf": {"depths": (2, 2, 18, 2)},
    "focalnet_small_lrf": {"depths": (2, 2, 18, 2), "focal_levels": 3},
    "focalnet_base_srf": {"depths": (2, 2, 18, 2), "embed_dim": 128},
    "focalnet_base_lrf": {"depths": (2, 2, 18, 2), "embed_dim": 128, "focal_levels": 3},
    "focalnet_tiny_iso": {**_ISO, "embed_dim": 192},
    "focalnet_small_iso": {**_ISO, "embed_dim": 384},
    "focalnet_base_iso": {
        **_ISO,
        "embed_dim": 768,
        "post_norm": True,
        "post_norm_in_modulation": True,
        "layerscale_value": 1e-4,
    },
    "focalnet_large_fl3": {**_LARGE, "embed_dim": 192, "focal_levels": 3, "focal_windows": 5},
    "focalnet_large_fl4": {**_LARGE, "embed_dim": 192, "focal_levels": 4, "normalize_modulator": True},
    "focalnet_xlarge_fl3": {**_LARGE, "embed_dim": 256, "focal_levels": 3, "focal_windows": 5},
    "focalnet_xlarge_fl4": {**_LARGE, "embed_dim": 256, "focal_levels": 4},
    "focalnet_huge_fl3": {**_HUGE, "focal_levels": 3},
    "focalnet_huge_fl4": {**_HUGE, "focal_levels": 4},
    "test_focalnet": {"depths": (1, 1, 2, 1), "embed_dim": 16},
}
FocalNetDense.variants = VARIANTS


def _cfg(size: int = 224, **kwargs: Any) -> dict[str, Any]:
    entries: dict[str, Any] = {
        "crop_pct": 0.9,
        "first_conv": "stem.proj",
        "license": "mit",
        "paper_ids": "arXiv:2203.11926",
        "origin_url": "https://github.com/microsoft/FocalNet",
    }
    return pretrained_cfg(size, **{**entries, **kwargs})


_22K = {"num_classes": 21842, "size": 384, "crop_pct": 1.0}
_TAGS: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"{size}_{field}": ("ms_in1k", {}) for size in ("tiny", "small", "base") for field in ("srf", "lrf")},
    **{f"{size}_{levels}": ("ms_in22k", _22K) for size in ("large", "xlarge") for levels in ("fl3", "fl4")},
    "huge_fl3": ("ms_in22k", {"num_classes": 21842}),
    "huge_fl4": ("ms_in22k", {"num_classes": 0}),
}
default_cfgs = generate_default_cfgs(
    {
        **{
            f"attn_focalnet_{size}.{tag}": _cfg(hf_hub_id=f"timm/focalnet_{size}.{tag}", **options)
            for size, (tag, options) in _TAGS.items()
        },
        **{f"focalnet_{size}_iso": _cfg(pool_size=(14, 14)) for size in ("tiny", "small", "base")},
        "test_focalnet": _cfg(96),
    }
)

CARD = Card(
    family="FocalNet",
    paper="2203.11926",
    code="https://github.com/microsoft/FocalNet",
    license="MIT",
    test="models/test_focalnet.py",
)
CARDS = {
    "focalnet_tiny_srf": CARD("28.4 M parameters, 4.4 G multiply-adds at 224²", "top-1 82.1 %"),
    "focalnet_tiny_lrf": CARD("28.6 M parameters, 4.5 G multiply-adds at 224²", "top-1 82.3 %"),
    "focalnet_small_srf": CARD("49.9 M parameters, 8.6 G multiply-adds at 224²", "top-1 83.4 %"),
    "focalnet_small_lrf": CARD("50.3 M parameters, 8.7 G multiply-adds at 224²", "top-1 83.5 %"),
    "focalnet_base_srf": CARD("88.1 M parameters, 15.3 G multiply-adds at 224²", "top-1 83.7 %"),
    "focalnet_base_lrf": CARD("88.7 M parameters, 15.4 G multiply-adds at 224²", "top-1 83.9 %"),
    "focalnet_tiny_iso": CARD("One resolution: 5.9 M parameters, 1.1 G multiply-adds at 224²", "top-1 74.1 %"),
    "focalnet_small_iso": CARD("One resolution: 22.4 M parameters, 4.3 G multiply-adds at 224²", "top-1 80.9 %"),
    "focalnet_base_iso": CARD("One resolution: 87.3 M parameters, 16.9 G multiply-adds at 224²", "top-1 82.4 %"),
    "focalnet_large_fl3": CARD("239.1 M parameters with ImageNet-22k's classes, 384²"),
    "focalnet_large_fl4": CARD("239.3 M parameters with ImageNet-22k's classes, 384²; mean over the levels"),
    "focalnet_xlarge_fl3": CARD("408.8 M parameters with ImageNet-22k's classes, 384²"),
    "focalnet_xlarge_fl4": CARD("409.0 M parameters with ImageNet-22k's classes, 384²"),
    "focalnet_huge_fl3": CARD("745.3 M parameters with ImageNet-22k's classes, 224²"),
    "focalnet_huge_fl4": CARD("686.5 M parameters without classifier, 224²"),
    "test_focalnet": CARD("Small enough for tests (< 0.5 M parameters)"),
}
# timm's convention for a ViT: the last three blocks of an isotropic network
_ISO_MAPS = {"flatten_sequential": True, "out_indices": (9, 10, 11)}
ENTRIES = timm_entries(
    FocalNet, VARIANTS, CARDS, default_cfgs, maps=lambda name: _ISO_MAPS if name.endswith("_iso") else STAGES
)
