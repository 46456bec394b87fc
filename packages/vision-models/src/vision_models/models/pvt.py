"""Agent-PVT and InLine-PVT: Pyramid Vision Transformers whose tokens attend to the whole map at linear cost.

Papers: Han et al., Agent Attention, ECCV 2024, arXiv 2312.08874; Han et al., Bridging the Divide, NeurIPS 2024, arXiv
2412.06590; the host is Wang et al., Pyramid Vision Transformer, ICCV 2021, arXiv 2102.12122. Official code:
LeapLabTHU/Agent-Attention, ``agent_transformer/models/agent_pvt.py`` and ``downstream``; LeapLabTHU/InLine,
``models/inline_pvt.py``.

The same as there: every number. The official files differ in the attention alone (InLine has twice the heads), so one
host takes any of them for each stage; ``"softmax"`` is PVT's own, whose keys and values come from a map smaller by
``sr_ratios``. There is no class token and no last norm.

What differs: token maps stay channels-last. Position embeddings are stretched as there: bicubic at loading, bilinear
for an image of another size. InLine does not combine with smaller key maps, which its code does not survive.

Numbers are checked in ``tests/models/test_hosts.py`` against a plain network with all scores in full.

Shapes: image (B, 3, Y, X) → logits (B, num_classes); maps (B, C_i, ⌊Y/s⌋, ⌊X/s⌋) with s = 4, 8, 16, 32.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, LayerNorm2d
from timm.models import (
    register_notrace_function,
    register_notrace_module,
)
from torch import Tensor, nn

from attn_core import attention as attend
from attn_core.weights import KeyMap
from vision_models.backbone import Stage, StagedBackbone
from vision_models.initialization import trunc_normal_
from vision_models.layers.mixing import (
    AGENT,
    INLINE,
    AttentionOption,
    fit_table,
    host_cfgs,
    image_grid,
    kinds_of_blocks,
    token_mixing,
)
from vision_models.layers.token_maps import Linear, Mlp, init_linear
from vision_models.registration import timm_entries

__all__ = ["PVT"]

EPS = 1e-6  # of the norms in blocks; those of patches and smaller key maps have torch's 1e-5


@register_notrace_function
def with_position(x: Tensor, table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Adds the table (1, N, C) of ``grid`` to the map (B, C, Y, X), stretched if that has another size."""
    position = table.transpose(1, 2).reshape(1, x.shape[1], grid[0], grid[1])
    if torch.compiler.is_exporting() or x.shape[2] != grid[0] or x.shape[3] != grid[1]:
        position = F.interpolate(position, size=(x.shape[2], x.shape[3]), mode="bilinear")
    return x + position


class PatchEmbed(nn.Module):
    """Patches become tokens with a norm and a position. (B, C, Y, X) → (B, dim, Y/patch, X/patch)."""

    def __init__(self, in_chans: int, dim: int, patch: int, grid: tuple[int, int], **dd: Any) -> None:
        super().__init__()
        self.grid = grid
        self.proj = nn.Conv2d(in_chans, dim, patch, stride=patch, **dd)
        self.norm = LayerNorm2d(dim, eps=1e-5, **dd)
        self.pos_embed = nn.Parameter(trunc_normal_(torch.empty(1, grid[0] * grid[1], dim, **dd), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        return with_position(self.norm(self.proj(x)), self.pos_embed, self.grid)


@register_notrace_module
class ReducedAttention(nn.Module):
    """Softmax attention to the tokens of a map that is smaller by ``ratio``. (B, Y, X, dim) → same."""

    def __init__(self, dim: int, num_heads: int, ratio: int, qkv_bias: bool, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim, bias=qkv_bias, **dd)
        self.sr = nn.Conv2d(dim, dim, ratio, stride=ratio, **dd) if ratio > 1 else None
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd) if ratio > 1 else nn.Identity()
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, dim = x.shape
        q = self.q(x).view(batch, height * width, self.num_heads, dim // self.num_heads).transpose(1, 2)
        small = x
        sr = self.sr
        if sr is not None:
            small = self.norm(sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        kv = self.kv(small).reshape(batch, small.shape[1] * small.shape[2], 2, self.num_heads, q.shape[3])
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        out = attend(q, k, v)[0]
        return self.proj(out.transpose(1, 2).reshape(batch, height, width, dim))


class GlobalAttention(nn.Module):
    """Agent or InLine attention of the whole map between projections. (B, Y, X, dim) → same.

    Args:
        ratio: keys and values come from a map smaller by it on each side, as in softmax attention; agents only.
    """

    def __init__(self, dim: int, mixing: nn.Module, ratio: int, qkv_bias: bool, **dd: Any) -> None:
        super().__init__()
        self.q = Linear(dim, dim, bias=qkv_bias, **dd)
        self.sr = nn.Conv2d(dim, dim, ratio, stride=ratio, **dd) if ratio > 1 else None
        self.norm = nn.LayerNorm(dim, eps=1e-5, **dd) if ratio > 1 else nn.Identity()
        self.kv = Linear(dim, 2 * dim, bias=qkv_bias, **dd)
        self.mixing = mixing
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        tokens, small = x.flatten(1, 2), x
        if self.sr is not None:
            small = self.norm(self.sr(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        k, v = self.kv(small.flatten(1, 2)).chunk(2, dim=2)
        grid, kv_grid = (x.shape[1], x.shape[2]), (small.shape[1], small.shape[2])
        out = self.mixing(self.q(tokens), k, v, tokens, grid, **({} if self.sr is None else {"kv_grid": kv_grid}))
        return self.proj(out).reshape(x.shape)


class Block(nn.Module):
    """Attention, MLP, each with a residual. (B, Y, X, dim) → same."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, drop_path: float, **dd: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x)))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class PVT(StagedBackbone):
    """The classification network and, through timm's feature interfaces, a backbone for any resolution.

    The official dense backbone is this one with ``agent_shapes=((12, 12), (16, 16), (28, 28), (28, 28))`` and
    ``features_only=True``.

    Args:
        depths, embed_dims, num_heads, mlp_ratios: of each stage.
        attention: ``"agent"``, ``"inline"`` or ``"softmax"``, for all blocks, each stage, or each block of a stage.
        agents: agent tokens of each stage that has agent attention, square numbers.
        agent_shapes: rows and columns of another grid of agents for each stage, for large images.
        sr_ratios: how much smaller the map of keys and values is on each side, in softmax attention of each stage.
        agent_sr_ratios: the same in agent attention; None, as in all releases: 1 in each stage.
        img_size: the image that position and bias tables are made for; other sizes work, with stretched tables.

    Raises:
        ValueError: options that contradict each other or the widths.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 2, 2),
        embed_dims: Sequence[int] = (64, 128, 320, 512),
        num_heads: Sequence[int] = (1, 2, 5, 8),
        *,
        attention: AttentionOption = "softmax",
        agents: Sequence[int] = (9, 16, 49, 49),
        agent_shapes: Sequence[tuple[int, int]] | None = None,
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        agent_sr_ratios: Sequence[int] | None = None,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        count = len(depths)
        kinds = kinds_of_blocks("PVT", attention, depths)
        needed = agents if any("agent" in blocks for blocks in kinds) else depths
        agent_sr_ratios = (1,) * count if agent_sr_ratios is None else agent_sr_ratios
        each = (embed_dims, num_heads, mlp_ratios, needed, sr_ratios, agent_sr_ratios, agent_shapes or depths)
        if any(len(values) != count for values in each):
            raise ValueError(
                "PVT: embed_dims, num_heads, mlp_ratios, agents, sr_ratios, agent_sr_ratios and agent_shapes must have "
                f"one entry for each of {count} stages, got {embed_dims}, {num_heads}, {mlp_ratios}, {agents}, "
                f"{sr_ratios}, {agent_sr_ratios}, {agent_shapes}"
            )
        for dim, heads in zip(embed_dims, num_heads, strict=True):
            if dim % heads:
                raise ValueError(f"PVT: num_heads must divide the width of its stage, got {heads} and {dim}")
        image = image_grid("PVT", img_size)
        if min(image) < 4 << (count - 1):
            raise ValueError(f"PVT: img_size must be at least {4 << (count - 1)}, got img_size={img_size}")
        for option, ratios in (("sr_ratios", sr_ratios), ("agent_sr_ratios", agent_sr_ratios)):
            if min(ratios) < 1:
                raise ValueError(f"PVT: {option} must be positive, got {option}={ratios}")

        self.min_side = 4 << (count - 1)
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = embed_dims[-1]
        self.feature_info = []
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()

        def block(i: int, j: int, grid: tuple[int, int]) -> Block:
            dim, heads, kind = embed_dims[i], num_heads[i], kinds[i][j]
            if kind == "softmax":
                attn: nn.Module = ReducedAttention(dim, heads, sr_ratios[i], qkv_bias, **dd)
            else:
                shape = agent_shapes[i] if agent_shapes else None
                number, ratio = (agents[i], agent_sr_ratios[i]) if kind == "agent" else (0, 1)
                kv_grid = (grid[0] // ratio, grid[1] // ratio)
                mixing = token_mixing(kind, dim, heads, grid, number, kv_grid=kv_grid, agent_shape=shape, **dd)
                attn = GlobalAttention(dim, mixing, ratio, qkv_bias, **dd)
            return Block(dim, attn, mlp_ratios[i], rates.pop(0), **dd)

        grids = [(image[0] // (4 << i), image[1] // (4 << i)) for i in range(count)]
        self.stem = PatchEmbed(in_chans, embed_dims[0], 4, grids[0], **dd)
        stages: list[nn.Module] = []
        for i, depth in enumerate(depths):
            downsample = PatchEmbed(embed_dims[i - 1], embed_dims[i], 2, grids[i], **dd) if i else nn.Identity()
            stages.append(Stage(downsample, [block(i, j, grids[i]) for j in range(depth)]))
            self.feature_info.append({"num_chs": embed_dims[i], "reduction": 4 << i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity()
        self.head = ClassifierHead(embed_dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.apply(init_linear)

    def fit_table(self, name: str, value: Tensor) -> Tensor:
        """A checkpoint's value of a parameter; position and agent tables of another grid stretched to ours."""
        return fit_table(self, name, value)


KEY_MAP: KeyMap = {
    "pvt": (
        (r"^stem\.pos_embed$", "pos_embed1"),
        (r"^stem\.", "patch_embed1."),
        *((rf"^stages\.{i}\.downsample\.pos_embed$", f"pos_embed{i + 1}") for i in (1, 2, 3)),
        *((rf"^stages\.{i}\.downsample\.", f"patch_embed{i + 1}.") for i in (1, 2, 3)),
        *((rf"^stages\.{i}\.blocks\.", f"block{i + 1}.") for i in (0, 1, 2, 3)),
        (r"\.attn\.mixing\.", ".attn."),
        (r"^head\.fc\.", "head."),
    ),
}
PVT.key_map = KEY_MAP

_SIZES = {"tiny": (2, 2, 2, 2), "small": (3, 4, 6, 3), "medium": (3, 4, 18, 3), "large": (3, 8, 27, 3)}
_TEST: dict[str, Any] = {"depths": (1, 1, 1, 1), "embed_dims": (16, 24, 32, 48), "img_size": 96}
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"agent_pvt_{size}": {"attention": "agent", "depths": depths} for size, depths in _SIZES.items()},
    "agent_pvt_medium_256": {"attention": "agent", "depths": _SIZES["medium"], "img_size": 256},
    **{
        f"inline_pvt_{size}": {"attention": "inline", "depths": depths, "num_heads": (2, 4, 10, 16)}
        for size, depths in _SIZES.items()
    },
    "test_agent_pvt": {**_TEST, "attention": ("agent", "agent", "agent", "softmax"), "num_heads": (1, 2, 2, 4)},
    "test_inline_pvt": {**_TEST, "attention": ("softmax", "inline", "inline", "inline"), "num_heads": (1, 2, 2, 4)},
}


default_cfgs = host_cfgs(VARIANTS, first_conv="stem.proj")

CARDS = {
    "agent_pvt_tiny": AGENT("11.6 M parameters, 2.0 G multiply-adds at 224²", "top-1 78.4 %"),
    "agent_pvt_small": AGENT("20.6 M parameters, 4.0 G multiply-adds at 224²", "top-1 82.2 %"),
    "agent_pvt_medium": AGENT("35.9 M parameters, 7.0 G multiply-adds at 224²", "top-1 83.4 %"),
    "agent_pvt_medium_256": AGENT("36.1 M parameters, 9.2 G multiply-adds at 256²", "top-1 83.8 %"),
    "agent_pvt_large": AGENT("48.7 M parameters, 10.4 G multiply-adds at 224²", "top-1 83.7 %"),
    "inline_pvt_tiny": INLINE("12.0 M parameters, 2.0 G multiply-adds at 224²", "top-1 78.2 %"),
    "inline_pvt_small": INLINE("21.6 M parameters, 3.9 G multiply-adds at 224²", "top-1 82.0 %"),
    "inline_pvt_medium": INLINE("37.6 M parameters, 6.9 G multiply-adds at 224²", "top-1 83.2 %"),
    "inline_pvt_large": INLINE("51.2 M parameters, 10.2 G multiply-adds at 224²", "top-1 83.6 %"),
    "test_agent_pvt": AGENT("Small enough for tests (< 0.5 M parameters)"),
    "test_inline_pvt": INLINE("Small enough for tests (< 0.5 M parameters)"),
}
ENTRIES = timm_entries(PVT, VARIANTS, CARDS, default_cfgs)
