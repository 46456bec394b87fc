"""NAT and DiNAT: hierarchical and isotropic transformers whose tokens attend to their neighborhoods.

Papers: Hassani et al., Neighborhood Attention Transformer, CVPR 2023, arXiv 2204.07143; Hassani and Shi, Dilated
Neighborhood Attention Transformer, arXiv 2209.15001. Official code: SHI-Labs/Neighborhood-Attention-Transformer,
``classification/nat.py``, ``dinat.py``, ``dinats.py`` and ``isotropic.py``, over ``natten`` 0.14.

The same as there: every number. NAT and DiNAT are one network, dilated in every second block or not; ``dinat_s`` has
Swin's patches and merging around the blocks (``tokens="patch"``); the isotropic ones have one stage of 16×16 patches,
and ``vitrpb`` attends to the whole map, with a table of all relative positions (``attention="softmax"``).

What differs: any image size works. Maps smaller than a dilated window are padded as by natten 0.14, which trained the
weights; from 0.17 on it refuses them. Tables of another kernel size or map are stretched bicubically, where the
official code wants maps of one size. Token maps stay channels-last.

Numbers are checked in ``tests/models/test_nat.py`` against a plain network.

Shapes: image (B, 3, Y, X) → logits (B, num_classes); maps (B, C_i, ⌈Y/s⌉, ⌈X/s⌉) with s = 4, 8, 16, 32, or 16 alone.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, LayerNorm2d
from timm.models import generate_default_cfgs, register_notrace_module
from torch import Tensor, nn

from attn_core import attention as attend
from attn_core.catalog import Card
from attn_core.weights import KeyMap
from vision_models.backbone import Dense, Stage, StagedBackbone
from vision_models.initialization import trunc_normal_
from vision_models.layers.neighborhood import NeighborhoodAttention
from vision_models.layers.token_maps import Linear, Mlp, init_linear, pad_map
from vision_models.registration import STAGES, pretrained_cfg, timm_entries

__all__ = ["NAT", "NATDense"]

Tokens = Literal["conv", "patch"]
EPS = 1e-5


def stretched(table: Tensor, size: tuple[int, int]) -> Tensor:
    """A table of relative positions (heads, rows, columns) with ``size`` rows and columns."""
    if table.shape[1] == size[0] and table.shape[2] == size[1]:
        return table
    return F.interpolate(table[None], size=size, mode="bicubic")[0]


@register_notrace_module  # the bias depends on the size of the map
class MapAttention(nn.Module):
    """Softmax attention of the whole map with a table of all relative positions. (B, Y, X, dim) → same.

    Args:
        side: rows and columns of the map that the table is made for; another map stretches it.
    """

    def __init__(self, dim: int, num_heads: int, side: int, *, qkv_bias: bool = True, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        table = torch.empty(num_heads, 2 * side - 1, 2 * side - 1, **dd)
        self.rpb = nn.Parameter(trunc_normal_(table, std=0.02))
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).flatten(1, 2).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        out, _ = attend(q, k, v, bias=self.bias(x.shape[1], x.shape[2])[None])
        return self.proj(out.transpose(1, 2).reshape(x.shape))

    def bias(self, height: int, width: int) -> Tensor:
        """(heads, N, N): the table at key − query."""
        table = stretched(self.rpb, (2 * height - 1, 2 * width - 1))
        rows, columns = (torch.arange(side, device=table.device) for side in (height, width))
        down = (rows[None] - rows[:, None] + height - 1)[:, None, :, None]
        right = (columns[None] - columns[:, None] + width - 1)[None, :, None, :]
        return table[:, down, right].flatten(3, 4).flatten(1, 2)


class Block(nn.Module):
    """Attention, MLP, each with a residual and perhaps a scale for each channel. (B, Y, X, dim) → same."""

    def __init__(
        self, dim: int, attn: nn.Module, mlp_ratio: float, layer_scale: float | None, drop_path: float, **dd: Any
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.gamma1 = self.gamma2 = None
        if layer_scale is not None:
            self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale, **dd))
            self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale, **dd))

    def forward(self, x: Tensor) -> Tensor:
        out = self.attn(self.norm1(x))
        x = x + self.drop_path1(out if self.gamma1 is None else self.gamma1 * out)
        out = self.mlp(self.norm2(x))
        return x + self.drop_path2(out if self.gamma2 is None else self.gamma2 * out)


class ConvStem(nn.Module):
    """Two 3×3 convolutions of stride 2 with nothing between them, then a norm. (B, 3, Y, X) → (B, dim, Y/4, X/4)."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
            nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        )
        self.norm = LayerNorm2d(dim, eps=EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(x))


class PatchStem(nn.Module):
    """Patches of the image padded to a multiple of them, then a norm. (B, 3, Y, X) → (B, dim, Y/patch, X/patch)."""

    def __init__(self, in_chans: int, dim: int, patch: int, **dd: Any) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(in_chans, dim, patch, stride=patch, **dd)
        self.norm = LayerNorm2d(dim, eps=EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(pad_map(x, self.patch)))


class ConvDownsample(nn.Module):
    """A 3×3 convolution of stride 2, then a norm. (B, C, Y, X) → (B, 2·C, Y/2, X/2)."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = LayerNorm2d(2 * dim, eps=EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


class Merging(nn.Module):
    """Four neighbors, of a map padded to an even size, become one token. (B, C, Y, X) → (B, 2·C, Y/2, X/2)."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=EPS, **dd)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_map(x, 2).permute(0, 2, 3, 1)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], 3)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


class NAT(StagedBackbone):
    """The classification network and, through timm's feature interfaces, a backbone for any resolution.

    Args:
        depths, num_heads: of each stage; the width doubles from stage to stage. One stage: an isotropic network.
        kernel_size: side of a window, odd.
        dilation: of the blocks with an odd number, one value for each stage; the others have 1.
        tokens: ``"conv"``: overlapping convolutions make tokens and shrink maps; ``"patch"``: patches and merging.
        patch_size: side of a patch, with ``tokens="patch"``.
        attention: ``"neighborhood"``, or ``"softmax"`` over the whole map.
        img_size: the image that the tables of ``attention="softmax"`` are made for; other sizes stretch them.
        layer_scale: start of the scales of residual branches; None: there are none.

    Raises:
        ValueError: options that contradict each other or the widths.
    """

    official_buffers = ("relative_position_index",)
    undecayed = (".rpb", ".gamma1", ".gamma2")

    def __init__(
        self,
        depths: Sequence[int] = (3, 4, 6, 5),
        embed_dim: int = 64,
        num_heads: Sequence[int] = (2, 4, 8, 16),
        *,
        kernel_size: int = 7,
        dilation: Sequence[int] | None = None,
        tokens: Tokens = "conv",
        patch_size: int = 4,
        attention: Literal["neighborhood", "softmax"] = "neighborhood",
        img_size: int = 224,
        layer_scale: float | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        count = len(depths)
        every = (1,) * count if dilation is None else tuple(dilation)
        if not len(num_heads) == len(every) == count:
            raise ValueError(
                f"NAT: num_heads and dilation must have one entry for each of {count} stages, got {num_heads}, {every}"
            )
        if tokens not in get_args(Tokens):
            raise ValueError(f"NAT: tokens must be 'conv' or 'patch', got tokens={tokens!r}")
        if attention not in ("neighborhood", "softmax"):
            raise ValueError(f"NAT: attention must be 'neighborhood' or 'softmax', got attention={attention!r}")
        if patch_size < 1 or img_size < 1:
            raise ValueError(f"NAT: patch_size and img_size must be positive, got {patch_size} and {img_size}")
        dims = [embed_dim << i for i in range(count)]
        for dim, heads in zip(dims, num_heads, strict=True):
            if dim % heads:
                raise ValueError(f"NAT: num_heads must divide the width of its stage, got {heads} and {dim}")
        stride = 4 if tokens == "conv" else patch_size

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = []
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()

        def block(stage: int, number: int) -> Block:
            dim, heads = dims[stage], num_heads[stage]
            if attention == "softmax":
                attn = MapAttention(dim, heads, max(1, -(-img_size // (stride << stage))), qkv_bias=qkv_bias, **dd)
            else:
                apart = every[stage] if number % 2 else 1
                attn = NeighborhoodAttention(dim, heads, kernel_size, apart, qkv_bias=qkv_bias, **dd)
            return Block(dim, attn, mlp_ratio, layer_scale, rates.pop(0), **dd)

        conv = tokens == "conv"
        self.stem = ConvStem(in_chans, embed_dim, **dd) if conv else PatchStem(in_chans, embed_dim, patch_size, **dd)
        smaller = ConvDownsample if conv else Merging
        stages: list[nn.Module] = []
        for i, depth in enumerate(depths):
            downsample = smaller(dims[i - 1], **dd) if i else nn.Identity()
            stages.append(Stage(downsample, [block(i, j) for j in range(depth)]))
            self.feature_info.append({"num_chs": dims[i], "reduction": stride << i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(dims[-1], eps=EPS, **dd)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.apply(init_linear)

    @property
    def fixed_size(self) -> str:
        """Why an exported graph serves one image size alone; empty where it serves all."""
        patches = "torch.export ties the memory order of the patches' map to the batch once its size is free"
        return patches if isinstance(self.stem, PatchStem) else ""

    def fit_table(self, name: str, value: Tensor) -> Tensor:
        """Tables of another kernel size, or of another map, stretched."""
        own = self.get_parameter(name)
        if name.endswith(".rpb") and value.ndim == 3 and value.shape[0] == own.shape[0]:
            return stretched(value, (own.shape[1], own.shape[2]))
        return value


class NATDense(Dense, NAT):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Backbone for detection and segmentation: a map for each stage, each with a LayerNorm of its own on the way out.

    Args:
        variant: name of the classification variant to start from; ``options`` override its constructor arguments.

    Shapes: image (B, 3, Y, X) → tuple of (B, C_i, ⌈Y/s⌉, ⌈X/s⌉), s = 4, 8, 16, 32.
    Raises: ValueError for an unknown variant.
    """

    out_eps = EPS

    def __init__(self, variant: str = "nat_mini", **options: Any) -> None:
        super().__init__(variant, **options)


# The official stage ends with the downsampling that ours begins with.
_LEVELS = tuple((rf"^stages\.{i + 1}\.downsample\.", f"levels.{i}.downsample.") for i in range(3))
_LAYERS = tuple((ours, official.replace("levels", "layers")) for ours, official in _LEVELS)
_ENDS = ((r"^stem\.", "patch_embed."), (r"^out_norms\.(\d)\.", r"norm\1."), (r"^head\.fc\.", "head."))
KEY_MAP: KeyMap = {
    "nat": (*_ENDS, *_LEVELS, (r"^stages\.", "levels.")),
    "dinat_s": (*_ENDS, *_LAYERS, (r"^stages\.", "layers.")),
    "isotropic": (*_ENDS, (r"^stages\.0\.blocks\.", "layers.")),
}
NAT.key_map = KEY_MAP

_DEEP = (3, 4, 18, 5)
_SWIN = (2, 2, 18, 2)
_DILATED: dict[str, Any] = {"dilation": (8, 4, 2, 1)}
_SMALL: dict[str, Any] = {"depths": _DEEP, "embed_dim": 96, "num_heads": (3, 6, 12, 24), "mlp_ratio": 2}
_BASE: dict[str, Any] = {"depths": _DEEP, "embed_dim": 128, "num_heads": (4, 8, 16, 32), "mlp_ratio": 2,
                         "layer_scale": 1e-5}  # fmt: skip
_LARGE: dict[str, Any] = {"depths": _DEEP, "embed_dim": 192, "num_heads": (6, 12, 24, 48), "mlp_ratio": 2}
_S: dict[str, Any] = {"tokens": "patch", "mlp_ratio": 4, "embed_dim": 96, "num_heads": (3, 6, 12, 24), **_DILATED}
_S_LARGE: dict[str, Any] = {**_S, "depths": _SWIN, "embed_dim": 192, "num_heads": (6, 12, 24, 48)}
_ISO: dict[str, Any] = {"depths": (12,), "tokens": "patch", "patch_size": 16, "mlp_ratio": 4}
_ISO_SMALL: dict[str, Any] = {**_ISO, "embed_dim": 384, "num_heads": (12,)}
_ISO_BASE: dict[str, Any] = {**_ISO, "embed_dim": 768, "num_heads": (24,)}
_TEST: dict[str, Any] = {"depths": (1, 2, 2, 1), "embed_dim": 12, "num_heads": (1, 2, 2, 4), "kernel_size": 3}
VARIANTS: dict[str, dict[str, Any]] = {
    "nat_mini": {},
    "nat_tiny": {"depths": _DEEP},
    "nat_small": {**_SMALL, "layer_scale": 1e-5},
    "nat_base": _BASE,
    "dinat_mini": _DILATED,
    "dinat_tiny": {"depths": _DEEP, **_DILATED},
    "dinat_small": {**_SMALL, **_DILATED},
    "dinat_base": {**_BASE, **_DILATED},
    "dinat_large": {**_LARGE, **_DILATED},
    "dinat_large_384": {**_LARGE, "dilation": (13, 6, 3, 1)},
    "dinat_large_384_11x11": {**_LARGE, **_DILATED, "kernel_size": 11},
    "dinat_s_tiny": {**_S, "depths": (2, 2, 6, 2)},
    "dinat_s_small": {**_S, "depths": _SWIN},
    "dinat_s_base": {**_S, "depths": _SWIN, "embed_dim": 128, "num_heads": (4, 8, 16, 32)},
    "dinat_s_large": _S_LARGE,
    "dinat_s_large_384": {**_S_LARGE, "dilation": (13, 6, 3, 1)},
    "nat_iso_small": _ISO_SMALL,
    "nat_iso_base": _ISO_BASE,
    "dinat_iso_small": {**_ISO_SMALL, "dilation": (2,)},
    "dinat_iso_base": {**_ISO_BASE, "dilation": (2,)},
    "vitrpb_small": {**_ISO_SMALL, "attention": "softmax"},
    "vitrpb_base": {**_ISO_BASE, "attention": "softmax"},
    "test_nat": {**_TEST, "layer_scale": 1e-5},
    "test_dinat_s": {**_TEST, "tokens": "patch", "dilation": (3, 2, 2, 1)},
}
NATDense.variants = VARIANTS


def _cfg(name: str) -> dict[str, Any]:
    size = 384 if "384" in name else 224
    cfg = pretrained_cfg(
        size,
        crop_pct=1.0 if size > 224 else 0.875,
        first_conv="stem.proj" if VARIANTS[name].get("tokens") == "patch" else "stem.proj.0",
        license="mit",
        paper_ids=f"arXiv:{CARDS[name].paper}",
        origin_url=CARDS[name].code,
    )
    return {**cfg, "pool_size": (14, 14)} if len(VARIANTS[name].get("depths", _DEEP)) == 1 else cfg


NAT_CARD = Card(
    family="NAT",
    paper="2204.07143",
    code="https://github.com/SHI-Labs/Neighborhood-Attention-Transformer",
    license="MIT",
    test="models/test_nat.py",
)
DINAT_CARD = Card(
    family="DiNAT",
    paper="2209.15001",
    code=NAT_CARD.code,
    license=NAT_CARD.license,
    test=NAT_CARD.test,
)
_DINAT_S = "Dilated, Swin's patches"
CARDS = {
    "nat_mini": NAT_CARD("20.0 M parameters, 2.7 G multiply-adds at 224²", "top-1 81.8 %"),
    "nat_tiny": NAT_CARD("27.9 M parameters, 4.3 G multiply-adds at 224²", "top-1 83.2 %"),
    "nat_small": NAT_CARD("50.7 M parameters, 7.8 G multiply-adds at 224²", "top-1 83.7 %"),
    "nat_base": NAT_CARD("89.8 M parameters, 13.7 G multiply-adds at 224²", "top-1 84.3 %"),
    "dinat_mini": DINAT_CARD("20.0 M parameters, 2.7 G multiply-adds at 224²", "top-1 81.8 %"),
    "dinat_tiny": DINAT_CARD("27.9 M parameters, 4.3 G multiply-adds at 224²", "top-1 82.7 %"),
    "dinat_small": DINAT_CARD("50.7 M parameters, 7.8 G multiply-adds at 224²", "top-1 83.8 %"),
    "dinat_base": DINAT_CARD("89.8 M parameters, 13.7 G multiply-adds at 224²", "top-1 84.4 %"),
    "dinat_large": DINAT_CARD("200.9 M parameters, 30.6 G multiply-adds at 224²", "top-1 86.6 % (ImageNet-22k first)"),
    "dinat_large_384": DINAT_CARD("200.9 M parameters, 89.7 G multiply-adds at 384²", "top-1 87.4 %"),
    "dinat_large_384_11x11": DINAT_CARD("201.1 M parameters, 92.4 G multiply-adds at 384²", "top-1 87.5 %"),
    "dinat_s_tiny": DINAT_CARD(f"{_DINAT_S}: 28.3 M parameters, 4.5 G multiply-adds at 224²", "top-1 81.8 %"),
    "dinat_s_small": DINAT_CARD(f"{_DINAT_S}: 49.6 M parameters, 8.7 G multiply-adds at 224²", "top-1 83.5 %"),
    "dinat_s_base": DINAT_CARD(f"{_DINAT_S}: 87.8 M parameters, 15.4 G multiply-adds at 224²", "top-1 83.8 %"),
    "dinat_s_large": DINAT_CARD(f"{_DINAT_S}: 196.5 M parameters, 34.5 G multiply-adds at 224²", "top-1 86.5 %"),
    "dinat_s_large_384": DINAT_CARD(f"{_DINAT_S}: 196.5 M parameters, 101.5 G multiply-adds at 384²", "top-1 87.4 %"),
    "nat_iso_small": DINAT_CARD("14×14 tokens, no dilation: 22.0 M parameters, 4.3 G multiply-adds", "top-1 80.0 %"),
    "nat_iso_base": DINAT_CARD("14×14 tokens, no dilation: 86.5 M parameters, 16.9 G multiply-adds", "top-1 81.6 %"),
    "dinat_iso_small": DINAT_CARD("14×14 tokens: 22.0 M parameters, 4.3 G multiply-adds", "top-1 80.8 %"),
    "dinat_iso_base": DINAT_CARD("14×14 tokens: 86.5 M parameters, 16.9 G multiply-adds", "top-1 82.1 %"),
    "vitrpb_small": DINAT_CARD("14×14 tokens, whole map: 22.1 M parameters, 4.6 G multiply-adds", "top-1 81.2 %"),
    "vitrpb_base": DINAT_CARD("14×14 tokens, whole map: 86.6 M parameters, 17.5 G multiply-adds", "top-1 82.5 %"),
    "test_nat": NAT_CARD("Small enough for tests (< 0.5 M parameters)"),
    "test_dinat_s": DINAT_CARD("Small enough for tests (< 0.5 M parameters)"),
}
default_cfgs = generate_default_cfgs({name: _cfg(name) for name in VARIANTS})
ENTRIES = timm_entries(
    NAT,
    VARIANTS,
    CARDS,
    default_cfgs,
    maps=lambda name: {**STAGES, "out_indices": tuple(range(len(VARIANTS[name].get("depths", _DEEP))))},
)
