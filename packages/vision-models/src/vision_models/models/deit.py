"""DeiT as a host of other attention: Agent-DeiT and InLine-DeiT, of linear cost, and mixture of heads (MoH-ViT).

Papers: Han et al., Agent Attention, ECCV 2024, arXiv 2312.08874; Han et al., Bridging the Divide, NeurIPS 2024, arXiv
2412.06590; Jin et al., MoH, 2024, arXiv 2410.11842; the host is Touvron et al., DeiT, ICML 2021, arXiv 2012.12877.
Official code: LeapLabTHU/Agent-Attention, ``agent_transformer/models/agent_deit.py``; LeapLabTHU/InLine,
``models/inline_deit.py``; SkyworkAI/MoH, ``MoH-DiT/models.py``, whose attention is that of timm's ViT.

The same as there: every number, and the parameters' names but for ``mixing``. The official files differ in the
attention alone, so one host takes any of them for each block; with ``"softmax"`` this is DeiT itself. The class token
takes part in attention, with biases of its own, but not in pooling and convolutions; InLine's kernels come from a mean
that includes it.

MoH's authors publish no DeiT: ``moh_vit_*_75`` have the shared and routed heads of their DiT of the same width and
depth, ``moh_vit_*_50`` the same in every block.

What differs: any image size works. Position embeddings are stretched bicubically, at loading as there and for an image
of another size. There is no distillation token, which no release has.

Numbers are checked in ``tests/models/test_hosts.py`` and ``tests/layers/test_mixture_of_heads.py`` against plain
networks, in ``tests/models/test_deit.py`` against timm's.

Shapes: image (B, 3, Y, X) → logits (B, num_classes); tokens (B, 1 + N, C), maps (B, C, ⌊Y/p⌋, ⌊X/p⌋), p = 16.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from attn_core.weights import KeyMap
from vision_models.backbone import TokenBackbone
from vision_models.initialization import trunc_normal_
from vision_models.layers.mixing import (
    AGENT,
    INLINE,
    Attention,
    fit_table,
    host_cfgs,
    image_grid,
    kinds_of_blocks,
    token_mixing,
)
from vision_models.layers.mixture_of_heads import MOH, Heads, RoutedSelfAttention, heads_of_blocks, moh_cfgs
from vision_models.layers.token_maps import Linear, Mlp, init_linear
from vision_models.layers.tokens import token_attention, with_position
from vision_models.registration import timm_entries

__all__ = ["DeiT"]

EPS = 1e-6


class SelfAttention(nn.Module):
    """Softmax attention between projections. (B, 1 + N, dim) → same."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:  # noqa: ARG002  for mixing on the grid
        return self.proj(token_attention(self.qkv(x), self.num_heads))


class GlobalAttention(nn.Module):
    """Agent or InLine attention between projections. (B, 1 + N, dim) → same."""

    def __init__(self, dim: int, mixing: nn.Module, qkv_bias: bool, **dd: Any) -> None:
        super().__init__()
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.mixing = mixing
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=2)
        return self.proj(self.mixing(q, k, v, x, grid))


class Block(nn.Module):
    """Attention, MLP, each with a residual. (B, 1 + N, dim) → same."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float, **dd: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x), grid))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Square patches, a rest being cut off. (B, 3, Y, X) → (B, dim, Y/patch, X/patch)."""

    def __init__(self, in_chans: int, dim: int, patch: int, **dd: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, patch, stride=patch, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class DeiT(TokenBackbone):
    """The classification network; its features are the patches after each block, as maps.

    Args:
        attention: ``"agent"``, ``"inline"`` or ``"softmax"``, for all blocks or each.
        agents: agent tokens of the blocks with agent attention, a square number.
        shared_heads, routed_heads: of the blocks with softmax attention, for all or each: heads that every token takes,
            and how many it chooses among the others (mixture of heads). None: plain attention.
        patch_size: side of a patch in pixels.
        img_size: the image that position and bias tables are made for; other sizes work, with stretched tables.
        global_pool: what the classifier reads: ``"token"``, the ``"avg"`` of patches, or all with ``""``.

    Raises:
        ValueError: options that contradict each other or the width.
    """

    undecayed = ("pos_embed", "cls_token")

    def __init__(
        self,
        depth: int = 12,
        embed_dim: int = 192,
        num_heads: int = 3,
        *,
        attention: Attention | Sequence[Attention] = "softmax",
        agents: int = 49,
        shared_heads: int | Sequence[int] | None = None,
        routed_heads: int | Sequence[int] | None = None,
        patch_size: int = 16,
        img_size: int | Sequence[int] = 224,
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
        kinds = kinds_of_blocks("DeiT", attention if isinstance(attention, str) else (attention,), (depth,))[0]
        if embed_dim % num_heads:
            raise ValueError(f"DeiT: num_heads must divide embed_dim, got {num_heads} and {embed_dim}")
        image = image_grid("DeiT", img_size)
        if not 1 <= patch_size <= min(image):
            raise ValueError(
                f"DeiT: patch_size must lie in 1…{min(image)}, the image's side, got patch_size={patch_size}"
            )
        heads = heads_of_blocks("DeiT", shared_heads, routed_heads, depth)

        self.in_chans = in_chans
        self.min_side = patch_size
        self.grid: tuple[int, int] = (image[0] // patch_size, image[1] // patch_size)
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()

        def attn(kind: Attention, heads: Heads | None) -> nn.Module:
            if kind == "softmax" and heads is not None:
                return RoutedSelfAttention(embed_dim, num_heads, *heads, qkv_bias=qkv_bias, **dd)
            if kind == "softmax":
                return SelfAttention(embed_dim, num_heads, qkv_bias, **dd)
            mixing = token_mixing(kind, embed_dim, num_heads, self.grid, agents, class_token=True, **dd)
            return GlobalAttention(embed_dim, mixing, qkv_bias, **dd)

        self.patch_embed = PatchEmbed(in_chans, embed_dim, patch_size, **dd)
        self.cls_token = nn.Parameter(trunc_normal_(torch.empty(1, 1, embed_dim, **dd), std=0.02))
        count = 1 + self.grid[0] * self.grid[1]
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, count, embed_dim, **dd), std=0.02))
        self.blocks = nn.ModuleList(
            Block(embed_dim, attn(kind, own), mlp_ratio, rate, **dd)
            for kind, own, rate in zip(kinds, heads, rates, strict=True)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=EPS, **dd)
        self.add_head(embed_dim, patch_size, num_classes, global_pool, drop_rate, **dd)
        self.apply(init_linear)

    def tokens(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """What enters the first block, and the rows and columns of its patches."""
        x = self.patch_embed(self.prepared(x))
        grid = (x.shape[2], x.shape[3])
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(2).transpose(1, 2)], 1)
        return with_position(x, self.pos_embed, self.grid, grid), grid

    def fit_table(self, name: str, value: Tensor) -> Tensor:
        """A checkpoint's value of a parameter; position and agent tables of another grid stretched to ours."""
        return fit_table(self, name, value)


KEY_MAP: KeyMap = {"deit": ((r"\.attn\.(mixing|router)\.", ".attn."),)}
DeiT.key_map = KEY_MAP

_SMALL: dict[str, Any] = {"embed_dim": 384, "num_heads": 6}
_BASE: dict[str, Any] = {"embed_dim": 768, "num_heads": 12}
_TEST: dict[str, Any] = {"depth": 4, "embed_dim": 48, "num_heads": 4, "img_size": 96}
VARIANTS: dict[str, dict[str, Any]] = {
    "agent_deit_tiny": {"attention": "agent"},
    "agent_deit_small": {"attention": "agent", "embed_dim": 384, "num_heads": 6},
    "agent_deit_small_448": {"attention": "agent", "embed_dim": 384, "num_heads": 6, "img_size": 448},
    "agent_deit_base": {
        "attention": ("agent",) * 4 + ("softmax",) * 8,
        "agents": 81,
        "embed_dim": 768,
        "num_heads": 12,
    },
    "inline_deit_tiny": {"attention": "inline", "num_heads": 6},
    "inline_deit_small": {"attention": "inline", "embed_dim": 320, "num_heads": 10, "img_size": 288},
    "inline_deit_base": {"attention": "inline", "embed_dim": 384, "num_heads": 12, "img_size": 448},
    "moh_vit_small_75": {
        **_SMALL,
        "shared_heads": (2, 2) + 8 * (3,) + (6, 6),
        "routed_heads": 6 * (1,) + 4 * (2,) + (0, 0),
    },
    "moh_vit_small_50": {**_SMALL, "shared_heads": 1, "routed_heads": 2},
    "moh_vit_base_75": {
        **_BASE,
        "shared_heads": (4, 4) + 8 * (6,) + (12, 12),
        "routed_heads": (2, 2) + 8 * (3,) + (0, 0),
    },
    "moh_vit_base_50": {**_BASE, "shared_heads": 2, "routed_heads": 4},
    "test_agent_deit": {**_TEST, "attention": ("agent", "agent", "agent", "softmax")},
    "test_inline_deit": {**_TEST, "attention": ("inline", "inline", "inline", "softmax")},
    "test_moh_vit": {**_TEST, "shared_heads": (2, 1, 0, 4), "routed_heads": (1, 1, 2, 0)},
}

_OF_MOH = {name: options for name, options in VARIANTS.items() if "moh" in name}
_OTHERS = {name: options for name, options in VARIANTS.items() if "moh" not in name}
_CFG: dict[str, Any] = {"first_conv": "patch_embed.proj", "classifier": "head", "pool_size": None}
default_cfgs = {**host_cfgs(_OTHERS, **_CFG), **moh_cfgs(_OF_MOH, **_CFG)}

CARDS = {
    "agent_deit_tiny": AGENT("6.0 M parameters, 1.2 G multiply-adds at 224²", "top-1 74.9 %"),
    "agent_deit_small": AGENT("22.6 M parameters, 4.4 G multiply-adds at 224²", "top-1 80.5 %"),
    "agent_deit_small_448": AGENT("23.1 M parameters, 17.7 G multiply-adds at 448²", "top-1 83.1 %"),
    "agent_deit_base": AGENT("87.2 M parameters, 17.6 G multiply-adds at 224²", "top-1 82.0 %"),
    "inline_deit_tiny": INLINE("6.5 M parameters, 1.1 G multiply-adds at 224²", "top-1 74.5 %"),
    "inline_deit_small": INLINE("16.7 M parameters, 5.0 G multiply-adds at 288²", "top-1 80.2 %"),
    "inline_deit_base": INLINE("23.8 M parameters, 17.2 G multiply-adds at 448²", "top-1 82.3 %"),
    "moh_vit_small_75": MOH("75 % of the heads of DeiT-Small: 22.1 M parameters"),
    "moh_vit_small_50": MOH("50 % of the heads of DeiT-Small: 22.1 M parameters"),
    "moh_vit_base_75": MOH("75 % of the heads of DeiT-Base: 86.7 M parameters"),
    "moh_vit_base_50": MOH("50 % of the heads of DeiT-Base: 86.7 M parameters"),
    "test_agent_deit": AGENT("Small enough for tests (< 0.5 M parameters)"),
    "test_inline_deit": INLINE("Small enough for tests (< 0.5 M parameters)"),
    "test_moh_vit": MOH("Small enough for tests (< 0.5 M parameters)"),
}
ENTRIES = timm_entries(DeiT, VARIANTS, CARDS, default_cfgs, maps=lambda _: {"feature_cls": "getter", "out_indices": 3})
