"""DaViT: blocks that attend to the tokens of a window, then to the channels of the whole image.

Paper: Ding et al., DaViT: Dual Attention Vision Transformers, ECCV 2022, arXiv 2204.03645. Official code:
dingmyu/davit, ``timm/models/davit.py``. The image towers of Florence-2 (arXiv 2311.06242) are DaViTs with other names
and a second version of channel attention. timm has the model as ``davit_*``; parameters here have timm's names.

The same as there: every number. Padding enters the windows after the norm, unmasked; channel attention is
softmax(KᵀV)·Qᵀ in the names of the projection (the paper writes it with the names rotated); the head pools before it
normalizes.

What differs: token maps stay channels-last, so that no block transposes; window attention, channel attention and linear
layers are attn_core's; maps smaller than a window and odd sizes work at every stage.

Numbers are checked in ``tests/models/test_davit.py`` against timm.

Shapes: image (B, 3, Y, X) → logits (B, num_classes); maps (B, C_i, ⌈Y/s⌉, ⌈X/s⌉) with s = 4, 8, 16, 32.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, Literal

import torch
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, NormMlpClassifierHead
from timm.models import (
    generate_default_cfgs,
    register_notrace_function,
)
from torch import Tensor, nn

from attn_core import attention, channel_attention
from attn_core.catalog import Card
from attn_core.weights import KeyMap
from vision_models.backbone import WINDOWS, Dense, Stage, StagedBackbone
from vision_models.layers.token_maps import DepthwiseConv, Linear, Mlp, from_windows, init_linear, pad_map, to_windows
from vision_models.registration import pretrained_cfg, timm_entries

__all__ = ["DaViT", "DaViTDense"]

AttentionType = Literal["spatial", "channel"]
EPS = 1e-5


@register_notrace_function
def token_attention(qkv: Tensor, num_heads: int) -> Tensor:
    """Softmax attention within each window: (W, N, 3·C) → (W, N, C)."""
    batch, tokens, channels = qkv.shape
    q, k, v = qkv.view(batch, tokens, 3, num_heads, channels // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
    out = attention(q, k, v)[0]
    return out.transpose(1, 2).reshape(batch, tokens, channels // 3)


@register_notrace_function
def grouped_channel_attention(qkv: Tensor, num_heads: int, version: int) -> Tensor:
    """Softmax attention among the channels of a group, summed over all tokens: (B, Y, X, 3·C) → (B, Y, X, C)."""
    batch, height, width, channels = qkv.shape
    tokens = height * width
    q, k, v = qkv.view(batch, tokens, 3, num_heads, channels // (3 * num_heads)).permute(2, 0, 3, 1, 4).unbind(0)
    scale = float(q.shape[3]) ** -0.5
    if version == 2:
        q, k, v, scale = v, q, k, float(tokens) ** -0.5
    out = channel_attention(k, v, q, scale=scale)
    return out.transpose(1, 2).reshape(batch, height, width, channels // 3)


class PositionalConv(nn.Module):
    """x + depthwise 3×3 convolution of x, optionally through a GELU. (B, Y, X, C) → same."""

    def __init__(self, dim: int, act: bool, **dd: Any) -> None:
        super().__init__()
        self.proj = DepthwiseConv(dim, 3, **dd)
        self.act = nn.GELU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.act(self.proj(x))


class WindowAttention(nn.Module):
    """Multi-head attention within windows, without shift and position bias. (B, Y, X, dim) → same."""

    def __init__(self, dim: int, num_heads: int, window_size: int, qkv_bias: bool, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window_size = window_size
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        windows = token_attention(self.qkv(to_windows(x, self.window_size, self.window_size)), self.num_heads)
        return self.proj(from_windows(windows, self.window_size, self.window_size, x))


class ChannelAttention(nn.Module):
    """Attention among channels, the whole map at once (eq. 4); version 2 is Florence-2's. (B, Y, X, dim) → same."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, version: Literal[1, 2], **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.version = version
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(grouped_channel_attention(self.qkv(x), self.num_heads, self.version))


class Block(nn.Module):
    """Position, attention, position, MLP unless ``ffn=False``, each with a residual. (B, Y, X, dim) → same."""

    def __init__(
        self, dim: int, attn: nn.Module, mlp_ratio: float, cpe_act: bool, ffn: bool, drop_path: float, **dd: Any
    ) -> None:
        super().__init__()
        self.cpe1 = PositionalConv(dim, cpe_act, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.cpe2 = PositionalConv(dim, cpe_act, **dd)
        self.ffn = ffn
        if ffn:
            self.norm2 = nn.LayerNorm(dim, eps=EPS, **dd)
            self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
            self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.cpe1(x)
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        x = self.cpe2(x)
        if not self.ffn:
            return x
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Stem(nn.Module):
    """Overlapping 7×7 patches, stride 4, of the image padded to a multiple of 4. (B, 3, Y, X) → (B, dim, Y/4, X/4)."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, 7, stride=4, padding=3, **dd)
        self.norm = LayerNorm2d(dim, eps=EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(pad_map(x, 4)))


class Downsample(nn.Module):
    """Norm, then a 2×2 convolution of the map padded to an even size, or an overlapping 3×3 one, stride 2."""

    def __init__(self, in_dim: int, dim: int, kernel: int, **dd: Any) -> None:
        super().__init__()
        self.norm = LayerNorm2d(in_dim, eps=EPS, **dd)
        self.conv = nn.Conv2d(in_dim, dim, kernel, stride=2, padding=1 if kernel == 3 else 0, **dd)
        self.multiple = 2 if kernel == 2 else 1

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pad_map(self.norm(x), self.multiple))


class DaViT(StagedBackbone):
    """The classification network and, through timm's feature interfaces, a backbone for any resolution.

    Args:
        depths: layers per stage; each has a block for every entry of ``attn_types``.
        num_heads: of window attention, and groups of channel attention.
        window_size: side of a window (the official 384² models use 12).
        cpe_act: GELU behind the positional convolutions.
        ffn: False leaves out the MLP of each block and its norm.
        down_kernel_size: 2, or 3 for overlapping patches between stages.
        channel_attention_version: 2 for Florence-2: usual order of the projections, scale N^−½.
        named_blocks: Florence-2's names of the blocks.
        head_norm_first: normalize before pooling.

    Raises:
        ValueError: options that contradict each other or the widths.
    """

    def __init__(
        self,
        depths: Sequence[int] = (1, 1, 3, 1),
        dims: Sequence[int] = (96, 192, 384, 768),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        attn_types: Sequence[AttentionType] = ("spatial", "channel"),
        cpe_act: bool = False,
        ffn: bool = True,
        down_kernel_size: Literal[2, 3] = 2,
        channel_attention_version: Literal[1, 2] = 1,
        named_blocks: bool = False,
        head_norm_first: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if not len(depths) == len(dims) == len(num_heads):
            raise ValueError(
                "DaViT: depths, dims and num_heads must have one entry for each stage, "
                f"got {depths}, {dims}, {num_heads}"
            )
        for dim, heads in zip(dims, num_heads, strict=True):
            if dim % heads:
                raise ValueError(f"DaViT: num_heads must divide the width of its stage, got {heads} and {dim}")
        if window_size < 1:
            raise ValueError(f"DaViT: window_size must be positive, got window_size={window_size}")
        if not attn_types or not set(attn_types) <= {"spatial", "channel"}:
            raise ValueError(f"DaViT: attn_types must name 'spatial' and 'channel', got attn_types={attn_types!r}")
        if down_kernel_size not in (2, 3):
            raise ValueError(f"DaViT: down_kernel_size must be 2 or 3, got down_kernel_size={down_kernel_size}")
        if channel_attention_version not in (1, 2):
            raise ValueError(f"DaViT: channel_attention_version must be 1 or 2, got {channel_attention_version}")

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = []
        rates = torch.linspace(0, drop_path_rate, len(attn_types) * sum(depths), device="cpu").tolist()

        def block(kind: AttentionType, dim: int, heads: int) -> Block:
            if kind == "spatial":
                attn: nn.Module = WindowAttention(dim, heads, window_size, qkv_bias, **dd)
            else:
                attn = ChannelAttention(dim, heads, qkv_bias, channel_attention_version, **dd)
            return Block(dim, attn, mlp_ratio, cpe_act, ffn, rates.pop(0), **dd)

        def layer(dim: int, heads: int) -> nn.Sequential:
            blocks = [block(kind, dim, heads) for kind in attn_types]
            if named_blocks:
                return nn.Sequential(
                    OrderedDict((f"{kind}_block", b) for kind, b in zip(attn_types, blocks, strict=True))
                )
            return nn.Sequential(*blocks)

        self.stem = Stem(in_chans, dims[0], **dd)
        stages: list[nn.Module] = []
        for i, (depth, dim, heads) in enumerate(zip(depths, dims, num_heads, strict=True)):
            downsample = Downsample(dims[i - 1], dim, down_kernel_size, **dd) if i else nn.Identity()
            stages.append(Stage(downsample, [layer(dim, heads) for _ in range(depth)]))
            self.feature_info.append({"num_chs": dim, "reduction": 4 << i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        head_options: dict[str, Any] = {"pool_type": global_pool, "drop_rate": drop_rate, **dd}
        if head_norm_first:
            self.norm = LayerNorm2d(dims[-1], eps=EPS, **dd)
            self.head = ClassifierHead(dims[-1], num_classes, **head_options)
        else:
            self.norm = nn.Identity()
            self.head = NormMlpClassifierHead(dims[-1], num_classes, norm_layer=_head_norm, **head_options)
        self.apply(init_linear)

    @property
    def fixed_size(self) -> str:
        """Why an exported graph serves one image size alone; empty where it serves all."""
        return WINDOWS


class DaViTDense(Dense, DaViT):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Backbone for detection and segmentation: four maps, each with a LayerNorm of its own on the way out.

    Args:
        variant: name of the classification variant to start from; ``options`` override its constructor arguments.

    Shapes: image (B, 3, Y, X) → tuple of (B, C_i, ⌈Y/s⌉, ⌈X/s⌉), s = 4, 8, 16, 32.
    Raises: ValueError for an unknown variant.
    """

    out_eps = EPS

    def __init__(self, variant: str = "davit_tiny", **options: Any) -> None:
        super().__init__(variant, **{**options, "head_norm_first": True})  # whose head has no norm to be left over


def _head_norm(dim: int, **dd: Any) -> LayerNorm2d:
    return LayerNorm2d(dim, eps=EPS, **dd)


_FLORENCE_BLOCK = (
    (r"\.cpe1\.proj\.", ".conv1.fn.dw."),
    (r"(spatial_block)\.norm1\.", r"\1.window_attn.norm."),
    (r"(spatial_block)\.attn\.", r"\1.window_attn.fn."),
    (r"(channel_block)\.norm1\.", r"\1.channel_attn.norm."),
    (r"(channel_block)\.attn\.", r"\1.channel_attn.fn."),
    (r"\.cpe2\.proj\.", ".conv2.fn.dw."),
    (r"\.norm2\.", ".ffn.norm."),
    (r"\.mlp\.", ".ffn.fn.net."),
)
KEY_MAP: KeyMap = {
    "davit": (
        (r"^stem\.norm\.", "patch_embeds.0.norm."),
        (r"^stem\.conv\.", "patch_embeds.0.proj."),
        (r"^stages\.(\d)\.downsample\.norm\.", r"patch_embeds.\1.norm."),
        (r"^stages\.(\d)\.downsample\.conv\.", r"patch_embeds.\1.proj."),
        (r"^stages\.(\d)\.blocks\.", r"main_blocks.\1."),
        (r"\.cpe1\.", ".cpe.0."),
        (r"\.cpe2\.", ".cpe.1."),
        (r"^head\.norm\.", "norms."),
        (r"^out_norms\.(\d)\.", r"norm\1."),
        (r"^head\.fc\.", "head."),
    ),
    "florence2": (
        (r"^stem\.norm\.", "vision_tower.convs.0.norm."),
        (r"^stem\.conv\.", "vision_tower.convs.0.proj."),
        (r"^stages\.(\d)\.downsample\.norm\.", r"vision_tower.convs.\1.norm."),
        (r"^stages\.(\d)\.downsample\.conv\.", r"vision_tower.convs.\1.proj."),
        (r"^stages\.(\d)\.blocks\.", r"vision_tower.blocks.\1."),
        *_FLORENCE_BLOCK,
    ),
}
DaViT.key_map = KEY_MAP

_FLORENCE = {"window_size": 12, "down_kernel_size": 3, "channel_attention_version": 2, "named_blocks": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "davit_tiny": {},
    "davit_small": {"depths": (1, 1, 9, 1)},
    "davit_base": {"depths": (1, 1, 9, 1), "dims": (128, 256, 512, 1024), "num_heads": (4, 8, 16, 32)},
    "davit_large": {"depths": (1, 1, 9, 1), "dims": (192, 384, 768, 1536), "num_heads": (6, 12, 24, 48)},
    "davit_huge": {"depths": (1, 1, 9, 1), "dims": (256, 512, 1024, 2048), "num_heads": (8, 16, 32, 64)},
    "davit_giant": {"depths": (1, 1, 12, 3), "dims": (384, 768, 1536, 3072), "num_heads": (12, 24, 48, 96)},
    "test_davit": {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48), "num_heads": (2, 2, 4, 4), "window_size": 4},
}
VARIANTS["davit_base_fl"] = {**VARIANTS["davit_base"], **_FLORENCE}
VARIANTS["davit_huge_fl"] = {**VARIANTS["davit_huge"], **_FLORENCE}
DaViTDense.variants = VARIANTS


def _cfg(size: int = 224, **kwargs: Any) -> dict[str, Any]:
    entries: dict[str, Any] = {
        "crop_pct": 0.95,
        "first_conv": "stem.conv",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2204.03645",
        "origin_url": "https://github.com/dingmyu/davit",
    }
    return pretrained_cfg(size, **{**entries, **kwargs})


default_cfgs = generate_default_cfgs(
    {
        "attn_davit_tiny.msft_in1k": _cfg(hf_hub_id="timm/davit_tiny.msft_in1k"),
        "attn_davit_small.msft_in1k": _cfg(hf_hub_id="timm/davit_small.msft_in1k"),
        "attn_davit_base.msft_in1k": _cfg(hf_hub_id="timm/davit_base.msft_in1k"),
        "attn_davit_large": _cfg(),
        "attn_davit_huge": _cfg(),
        "attn_davit_giant": _cfg(),
        "attn_davit_base_fl.msft_florence2": _cfg(hf_hub_id="microsoft/Florence-2-base", size=768, num_classes=0),
        "attn_davit_huge_fl.msft_florence2": _cfg(hf_hub_id="microsoft/Florence-2-large", size=768, num_classes=0),
        "test_davit": _cfg(96),
    }
)

CARD = Card(
    family="DaViT",
    paper="2204.03645",
    code="https://github.com/dingmyu/davit",
    license="Apache-2.0",
    test="models/test_davit.py",
)
CARDS = {
    "davit_tiny": CARD("28.4 M parameters, 4.5 G multiply-adds at 224²", "top-1 82.8 %"),
    "davit_small": CARD("49.7 M parameters, 8.8 G multiply-adds at 224²", "top-1 84.2 %"),
    "davit_base": CARD("88.0 M parameters, 15.5 G multiply-adds at 224²", "top-1 84.6 %"),
    "davit_large": CARD("196.8 M parameters; weights were never released"),
    "davit_huge": CARD("348.9 M parameters; weights were never released"),
    "davit_giant": CARD("1.4 G parameters; weights were never released", "top-1 90.4 %"),
    "davit_base_fl": CARD("The image tower of Florence-2 base: windows of 12, overlapping patches between stages"),
    "davit_huge_fl": CARD("The image tower of Florence-2 large"),
    "test_davit": CARD("Small enough for tests (< 0.5 M parameters)"),
}
ENTRIES = timm_entries(DaViT, VARIANTS, CARDS, default_cfgs)
