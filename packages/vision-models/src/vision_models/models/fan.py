"""FAN with TAP: a fully attentional network whose attention reads tokens mixed with their neighborhoods.

Papers: Guo, Stutz, Schiele, Robustifying Token Attention for Vision Transformers, ICCV 2023, arXiv 2303.11126 (TAP and
ADL); the host is Zhou et al., Understanding The Robustness in Vision Transformers, ICML 2022, arXiv 2204.12451, the
stem of the hybrids Liu et al., A ConvNet for the 2020s, CVPR 2022, arXiv 2201.03545. Official code: guoyongcs/TAPADL,
``TAPADL_FAN/models/tap_fan.py`` and ``convnext_utils.py``.

The same as there: every number. What attention reads is pooled, what the residual adds is not. The MLP has no
activation but the one inside its convolutions, and its channels are gated by their attention to the mean channel of
their head. A class token meets the patches behind the trunk, in blocks where it alone attends; their norms change the
patches, too. Stochastic depth has one rate for all blocks. Norms of a hybrid's stem divide by C − 1 behind the first
one: the official code takes another formula for maps that are channels-last in memory, which its first norm makes them.

What differs: any image size works; positions are computed in float32 or better in any precision. Left out are the
blocks with squeeze and excitation, the widest hybrid and the hosts with windows, for which nothing was published.
Without ``scales`` this is FAN itself.

Numbers are checked in ``tests/models/test_tap.py`` against a plain network.

Shapes: image (B, 3, Y, X) → logits (B, num_classes); tokens (B, 1 + N, C), maps (B, C, ⌈Y/16⌉, ⌈X/16⌉).
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

import math
from itertools import pairwise
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d
from timm.models import generate_default_cfgs, register_notrace_module
from torch import Tensor, nn

from attn_core import attention as attend
from attn_core.weights import KeyMap
from vision_models.backbone import TokenBackbone
from vision_models.initialization import trunc_normal_
from vision_models.layers.token_maps import DepthwiseConv, Linear, Mlp, init_linear, pad_map
from vision_models.layers.token_pooling import ObservedAttention, TokenPooling
from vision_models.models.rvt import TAP_CARD
from vision_models.registration import pretrained_cfg, timm_entries

__all__ = ["FAN"]

Stem = Literal["overlapping", "convnext"]
EPS = 1e-6
PATCH = 16
FREQUENCIES = 32  # of positions, along each axis


class OverlappingPatches(nn.Module):
    """Four 3×3 convolutions of stride 2 with batch norms, GELUs between them. (B, 3, Y, X) → (B, dim, Y/16, X/16)."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in pairwise((in_chans, dim // 8, dim // 4, dim // 2, dim)):
            conv = nn.Conv2d(before, after, 3, stride=2, padding=1, bias=False, **dd)
            layers += [nn.Sequential(conv, nn.BatchNorm2d(after, **dd)), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class SampleNorm(nn.LayerNorm):
    """Norm over the last axis by the sample variance, which divides by C − 1. (…, C) → same."""

    def forward(self, input: Tensor) -> Tensor:
        """(…, C) → same."""
        centered = input - input.mean(-1, keepdim=True)
        var = centered.square().sum(-1, keepdim=True) / (input.shape[-1] - 1)
        return centered * torch.rsqrt(var + self.eps) * self.weight + self.bias


class MapNorm(SampleNorm):
    """The same over the channels of a map. (B, C, Y, X) → same."""

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, Y, X) → same."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    """7×7 depthwise convolution, norm, MLP, scale of each channel, residual. (B, C, Y, X) → same."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv_dw = DepthwiseConv(dim, 7, **dd)
        self.norm = SampleNorm(dim, eps=EPS, **dd)
        self.mlp = Mlp(dim, 4 * dim, **dd)
        self.gamma = nn.Parameter(torch.full((dim,), 1e-6, **dd))

    def forward(self, x: Tensor) -> Tensor:
        out = self.mlp(self.norm(self.conv_dw(x.permute(0, 2, 3, 1))))
        return x + (self.gamma * out).permute(0, 3, 1, 2)


class ConvNeXtStage(nn.Module):
    """Norm and 2×2 convolution of stride 2, unless the width stays; blocks. (B, C, Y, X) → (B, dim, Y', X')."""

    def __init__(self, before: int, dim: int, depth: int, **dd: Any) -> None:
        super().__init__()
        self.downsample = nn.Identity()
        if before != dim:
            self.downsample = nn.Sequential(MapNorm(before, eps=EPS, **dd), nn.Conv2d(before, dim, 2, stride=2, **dd))
        self.blocks = nn.Sequential(*(ConvNeXtBlock(dim, **dd) for _ in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class ConvNeXt(nn.Module):
    """The first two stages of a ConvNeXt. (B, 3, Y, X) → (B, 2·dim, Y/8, X/8)."""

    def __init__(self, in_chans: int, dim: int, depths: tuple[int, int], **dd: Any) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(in_chans, dim, 4, stride=4, **dd), LayerNorm2d(dim, eps=EPS, **dd))
        self.stages = nn.Sequential(
            ConvNeXtStage(dim, dim, depths[0], **dd), ConvNeXtStage(dim, 2 * dim, depths[1], **dd)
        )
        self.apply(_init_conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x))


class HybridPatches(nn.Module):
    """ConvNeXt's map in patches of 2, of an image padded to a multiple of 16. (B, 3, Y, X) → (B, dim, Y/16, X/16)."""

    def __init__(self, in_chans: int, dim: int, width: int, depths: tuple[int, int], **dd: Any) -> None:
        super().__init__()
        self.backbone = ConvNeXt(in_chans, width, depths, **dd)
        self.proj = nn.Conv2d(2 * width, dim, 2, stride=2, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.backbone(pad_map(x, PATCH)))


class Positions(nn.Module):
    """Sines and cosines of a token's place, from the first row and column (above 0) to the last (2π), projected."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.token_projection = nn.Conv2d(2 * FREQUENCIES, dim, 1, **dd)

    def forward(self, rows: int, columns: int) -> Tensor:
        """(1, rows·columns, dim)."""
        weight = self.token_projection.weight
        down, across = (self._waves(side, weight) for side in (rows, columns))
        shape = (rows, columns, FREQUENCIES)
        waves = torch.cat([down[:, None].expand(shape), across[None].expand(shape)], 2).to(weight.dtype)
        return F.linear(waves.flatten(0, 1), weight[:, :, 0, 0], self.token_projection.bias)[None]

    @staticmethod
    def _waves(side: int, like: Tensor) -> Tensor:
        """(side, FREQUENCIES): sines and cosines in turn, two of each frequency; in float32 or better."""
        options: dict[str, Any] = {"dtype": torch.promote_types(like.dtype, torch.float32), "device": like.device}
        place = torch.arange(1, side + 1, **options)
        place = place / (place[-1:] + EPS) * (2 * math.pi)
        exponent = torch.arange(0, FREQUENCIES, 2, **options) / FREQUENCIES
        angles = place[:, None] / 10000**exponent
        return torch.stack([angles.sin(), angles.cos()], 2).flatten(1)


register_notrace_module(Positions)  # counts rows and columns, which FX must not follow


class TokenAttention(ObservedAttention):
    """Softmax attention among the patches. (B, N, dim) → same."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim, bias=qkv_bias, **dd)
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        self.note(q, k)
        return self.proj(attend(q, k, v)[0].transpose(1, 2).flatten(2))


register_notrace_module(TokenAttention)


class ConvMlp(nn.Module):
    """Linear, x + γ · convolutions of x, linear; one activation, between the convolutions. (B, N, dim) → same."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden, **dd)
        self.conv1 = DepthwiseConv(hidden, 3, **dd)
        self.bn = nn.BatchNorm2d(hidden, **dd)
        self.conv2 = DepthwiseConv(hidden, 3, **dd)
        self.gamma = nn.Parameter(torch.ones(hidden, **dd))
        self.fc2 = Linear(hidden, dim, **dd)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = self.fc1(x)
        around = F.gelu(self.conv1(x.unflatten(1, grid))).permute(0, 3, 1, 2)
        around = self.conv2(self.bn(around).permute(0, 2, 3, 1)).flatten(1, 2)
        return self.fc2(x + self.gamma * around)


class ChannelAttention(nn.Module):
    """An MLP whose channels are gated by what they read from the mean channel of their head. (B, N, dim) → same."""

    def __init__(self, dim: int, hidden: int, num_heads: int, qkv_bias: bool, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1, **dd))
        self.mlp_v = ConvMlp(dim, hidden, **dd)
        self.norm_v = nn.LayerNorm(dim, eps=1e-5, **dd)  # the official code forgets to pass its own
        self.q = Linear(dim, dim, bias=qkv_bias, **dd)

    def gate(self, x: Tensor) -> Tensor:
        """(B, heads, D): softmax over the tokens on both sides, a sigmoid behind their product."""
        q = self.q(x).softmax(1).unflatten(2, (self.num_heads, -1))
        k = x.softmax(1).unflatten(2, (self.num_heads, -1)).mean(3)
        return torch.einsum("bnhd,bnh->bhd", q, k).sigmoid() * self.temperature[:, :, 0]

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.norm_v(self.mlp_v(x, grid)) * self.gate(x).flatten(1)[:, None]


class Block(nn.Module):
    """Attention to pooled tokens, MLP with channel attention, each with a scale and a residual. (B, N, dim) → same."""

    def __init__(
        self, dim: int, pooling: nn.Module, attn: nn.Module, mlp: nn.Module, drop_path: float, **dd: Any
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.norm1 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.attn = attn
        self.gamma1 = nn.Parameter(torch.ones(dim, **dd))
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.mlp = mlp
        self.gamma2 = nn.Parameter(torch.ones(dim, **dd))
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        pooled = self.pooling(x.unflatten(1, grid)).flatten(1, 2)
        x = x + self.drop_path1(self.gamma1 * self.attn(self.norm1(pooled)))
        return x + self.drop_path2(self.gamma2 * self.mlp(self.norm2(x), grid))


class OneQuery(nn.Module):
    """Attention of the first token to all. (B, 1 + N, dim) → (B, 1, dim)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim, bias=qkv_bias, **dd)
        self.k = Linear(dim, dim, bias=qkv_bias, **dd)
        self.v = Linear(dim, dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        sides = (self.q(x[:, :1]), self.k(x), self.v(x))
        q, k, v = (side.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for side in sides)
        return self.proj(attend(q, k, v)[0].transpose(1, 2).flatten(2))


register_notrace_module(OneQuery)


class ClassAttentionBlock(nn.Module):
    """Attention and MLP of the class token; the patches pass both norms, too. (B, 1 + N, dim) → same."""

    def __init__(self, dim: int, num_heads: int, hidden: int, qkv_bias: bool, **dd: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.attn = OneQuery(dim, num_heads, qkv_bias, **dd)
        self.gamma1 = nn.Parameter(torch.ones(dim, **dd))
        self.norm2 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.mlp = Mlp(dim, hidden, **dd)
        self.gamma2 = nn.Parameter(torch.ones(dim, **dd))

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        x = x + self.gamma1 * torch.cat([self.attn(normed), normed[:, 1:]], 1)
        # The residual starts behind the norm, and the patches add themselves.
        x = self.norm2(x)
        return x + torch.cat([self.gamma2 * self.mlp(x[:, :1]), x[:, 1:]], 1)


class FAN(TokenBackbone):
    """The classification network; its features are the patches after each block, as maps.

    Args:
        stem: ``"overlapping"`` convolutions, or two stages of ``"convnext"`` (hybrids).
        stem_depths, stem_dim: blocks of those two stages and width of the first, with ``stem="convnext"``.
        scales: tokens and dilated means that attention reads a mix of; None: tokens alone, which is FAN.
        temperature: of the weights of that mix.
        class_blocks: blocks of the class token behind the trunk.
        global_pool: what the classifier reads: ``"token"``, the ``"avg"`` of patches, or all with ``""``.

    Raises:
        ValueError: options that contradict each other or the width.
    """

    def __init__(
        self,
        depth: int = 12,
        embed_dim: int = 192,
        num_heads: int = 4,
        *,
        stem: Stem = "overlapping",
        stem_depths: tuple[int, int] = (3, 3),
        stem_dim: int = 128,
        scales: int | None = 4,
        temperature: float = 1.0,
        class_blocks: int = 2,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if stem not in get_args(Stem):
            raise ValueError(f"FAN: stem must be 'overlapping' or 'convnext', got stem={stem!r}")
        if embed_dim % num_heads:
            raise ValueError(f"FAN: num_heads must divide embed_dim, got {num_heads} and {embed_dim}")
        if len(stem_depths) != 2:
            raise ValueError(f"FAN: stem_depths must have two entries, got stem_depths={stem_depths}")
        self.in_chans = in_chans
        hidden = int(embed_dim * mlp_ratio)

        def block() -> Block:
            pooling = (
                nn.Identity() if scales is None else TokenPooling(embed_dim, scales, temperature=temperature, **dd)
            )
            attn = TokenAttention(embed_dim, num_heads, qkv_bias, **dd)
            mlp = ChannelAttention(embed_dim, hidden, num_heads, qkv_bias, **dd)
            return Block(embed_dim, pooling, attn, mlp, drop_path_rate, **dd)

        if stem == "convnext":
            self.patch_embed = HybridPatches(in_chans, embed_dim, stem_dim, stem_depths, **dd)
        else:
            self.patch_embed = OverlappingPatches(in_chans, embed_dim, **dd)
        self.pos_embed = Positions(embed_dim, **dd)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, embed_dim, **dd), std=0.02))
        self.cls_attn_blocks = nn.ModuleList(
            ClassAttentionBlock(embed_dim, num_heads, hidden, qkv_bias, **dd) for _ in range(class_blocks)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=EPS, **dd)
        self.add_head(embed_dim, PATCH, num_classes, global_pool, drop_rate, **dd)
        self.apply(init_linear)
        self.blocks.apply(_init_depthwise)

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """What enters the first block, and its rows and columns; the class token comes behind the last."""
        x = self.patch_embed(self.prepared(x))
        grid = (x.shape[2], x.shape[3])
        return x.flatten(2).transpose(1, 2) + self.pos_embed(*grid), grid

    def finished(self, x: Tensor) -> Tensor:
        """Patches of the last block → class token and patches (B, 1 + N, num_features), behind their blocks, normed."""
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1)
        for block in self.cls_attn_blocks:
            x = block(x)
        return self.norm(x)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks behind the last one asked for, those of the class token too; returns absolute indices."""
        depth = len(self.blocks)
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if len(self.blocks) < depth:
            self.cls_attn_blocks = nn.ModuleList()
        return take

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed, as timm asks."""
        return {"cls_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:  # noqa: ARG002  timm's signature
        """Patterns of the layer groups for layer-wise decay, as timm asks; ``coarse`` changes nothing."""
        return {
            "stem": r"^pos_embed|^patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^cls_token|^cls_attn_blocks|^norm", (99999,))],
        }


def _init_depthwise(module: nn.Module) -> None:
    """Normal weights of variance 2/9 and zero biases for 3×3 depthwise convolutions, as officially."""
    if isinstance(module, DepthwiseConv):
        nn.init.normal_(module.weight, std=(2 / 9) ** 0.5)  # pyright: ignore[reportArgumentType]
        _zero(module.bias)  # pyright: ignore[reportArgumentType]


def _init_conv(module: nn.Module) -> None:
    """Truncated normal weights (0.02) and zero biases for ConvNeXt's convolutions."""
    if isinstance(module, nn.Conv2d):
        trunc_normal_(module.weight, std=0.02)
        _zero(module.bias)


def _zero(bias: Tensor | None) -> None:
    if bias is not None:
        nn.init.zeros_(bias)


KEY_MAP: KeyMap = {
    "tapadl": (
        (r"\.pooling\.", ".dilation_predictor."),
        (r"\.mlp_v\.(conv1|conv2|bn)\.", r".mlp_v.dwconv.\1."),
    )
}
FAN.key_map = KEY_MAP

_SMALL: dict[str, Any] = {"embed_dim": 384, "num_heads": 8}
_BASE: dict[str, Any] = {"embed_dim": 448, "num_heads": 8}
_LARGE: dict[str, Any] = {"embed_dim": 480, "num_heads": 10}
_HYBRID: dict[str, Any] = {"stem": "convnext"}
_TEST: dict[str, Any] = {"depth": 4, "embed_dim": 32}
VARIANTS: dict[str, dict[str, Any]] = {
    "tap_fan_tiny": {},
    "tap_fan_small": _SMALL,
    "tap_fan_base": {**_BASE, "depth": 18},
    "tap_fan_large": {**_LARGE, "depth": 24},
    "tap_fan_tiny_hybrid": {**_HYBRID, "depth": 8, "num_heads": 8},
    "tap_fan_small_hybrid": {**_HYBRID, **_SMALL, "depth": 10},
    "tap_fan_base_hybrid": {**_HYBRID, **_BASE, "depth": 16},
    "tap_fan_large_hybrid": {**_HYBRID, **_LARGE, "depth": 22, "stem_depths": (3, 5)},
    "test_tap_fan": _TEST,
    "test_tap_fan_hybrid": {**_TEST, **_HYBRID, "stem_dim": 12, "stem_depths": (1, 2)},
}


def _cfg(name: str) -> dict[str, Any]:
    return pretrained_cfg(
        pool_size=None,
        crop_pct=1.0,
        first_conv="patch_embed.backbone.stem.0" if "hybrid" in name else "patch_embed.proj.0.0",
        classifier="head",
        license="mit",
        paper_ids=f"arXiv:{TAP_CARD.paper}",
        origin_url=TAP_CARD.code,
    )


CARDS = {
    "tap_fan_tiny": TAP_CARD("In FAN-T-ViT: 7.4 M parameters"),
    "tap_fan_small": TAP_CARD("In FAN-S-ViT: 28.5 M parameters"),
    "tap_fan_base": TAP_CARD("In FAN-B-ViT: 54.6 M parameters"),
    "tap_fan_large": TAP_CARD("In FAN-L-ViT: 81.0 M parameters"),
    "tap_fan_tiny_hybrid": TAP_CARD("In FAN-T-Hybrid: 7.5 M parameters"),
    "tap_fan_small_hybrid": TAP_CARD("In FAN-S-Hybrid: 26.3 M parameters"),
    "tap_fan_base_hybrid": TAP_CARD(
        "In FAN-B-Hybrid: 50.7 M parameters, 11.9 G multiply-adds at 224²", "top-1 84.3 %, mCE 43.7 %"
    ),
    "tap_fan_large_hybrid": TAP_CARD("In FAN-L-Hybrid: 77.2 M parameters"),
    "test_tap_fan": TAP_CARD("Small enough for tests (< 0.5 M parameters)"),
    "test_tap_fan_hybrid": TAP_CARD("Small enough for tests (< 0.5 M parameters)"),
}
default_cfgs = generate_default_cfgs({name: _cfg(name) for name in VARIANTS})
ENTRIES = timm_entries(FAN, VARIANTS, CARDS, default_cfgs, maps=lambda _: {"feature_cls": "getter", "out_indices": 3})
