"""Agent-CSwin and InLine-CSwin: CSwin Transformers whose first stages attend to the whole map at linear cost.

Papers: Han et al., Agent Attention, ECCV 2024, arXiv 2312.08874; Han et al., Bridging the Divide, NeurIPS 2024, arXiv
2412.06590; the host is Dong et al., CSWin Transformer, CVPR 2022, arXiv 2107.00652. Official code:
LeapLabTHU/Agent-Attention, ``agent_transformer/models/agent_cswin.py``; LeapLabTHU/InLine, ``models/inline_cswin.py``.

The same as there: every number. The official files differ in the attention alone, so one host takes any of them for
each stage: ``"agent"`` and ``"inline"`` see the whole map, as in all releases; ``"softmax"`` is CSwin's own, half of
the heads in vertical and half in horizontal stripes, the last stage whole. InLine makes its kernels from the input of
the block, before the norm.

What differs: token maps stay channels-last; any image size works. Stripes that the map does not fill are padded with
tokens that nothing sees (the official networks take one size).

Numbers are checked in ``tests/models/test_hosts.py`` against a plain network with all scores in full.

Shapes: image (B, 3, Y, X) → logits (B, num_classes); maps (B, C_i, ⌈Y'/2^i⌉, ⌈X'/2^i⌉) with Y' = ⌊(Y + 1)/4⌋.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead, DropPath, LayerNorm2d
from timm.models import register_notrace_module
from torch import Tensor, nn

from attn_core import attention as attend
from attn_core.weights import KeyMap
from vision_models.backbone import WINDOWS, Stage, StagedBackbone
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
from vision_models.layers.token_maps import DepthwiseConv, Linear, Mlp, from_windows, init_linear, to_windows
from vision_models.registration import timm_entries

__all__ = ["CSwin"]

EPS = 1e-5


@register_notrace_module  # stripes depend on the size of the map
class StripeAttention(nn.Module):
    """Softmax attention within stripes of full height or width, plus a convolution of v within each stripe.

    Args:
        rows, columns: of a stripe; 0 for those of the map.

    Shapes: q, k, v (B, N, dim), source unused, grid (Y, X) → (B, N, dim).
    """

    def __init__(self, dim: int, num_heads: int, rows: int, columns: int, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.rows = rows
        self.columns = columns
        self.get_v = DepthwiseConv(dim, 3, **dd)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, source: Tensor, grid: tuple[int, int]) -> Tensor:  # noqa: ARG002  for mixing that reads it
        batch, _, dim = q.shape
        height, width = grid
        rows = height if self.rows == 0 else self.rows
        columns = width if self.columns == 0 else self.columns
        maps = torch.cat([q, k, v], 2).view(batch, height, width, 3 * dim)
        stripes = to_windows(maps, rows, columns).view(-1, rows * columns, 3, self.num_heads, dim // self.num_heads)
        q, k, v = stripes.permute(2, 0, 3, 1, 4).unbind(0)
        visible: Tensor | None = None
        if height % rows > 0 or width % columns > 0:
            inside = torch.ones(batch, height, width, 1, dtype=torch.bool, device=q.device)
            visible = to_windows(inside, rows, columns)[:, :, 0]
        out = attend(q, k, v, key_mask=visible)[0]
        local = self.get_v(v.transpose(1, 2).reshape(-1, rows, columns, dim)).flatten(1, 2)
        out = from_windows(out.transpose(1, 2).flatten(2) + local, rows, columns, maps)
        return out.reshape(batch, height * width, dim)


class Block(nn.Module):
    """Attention in one or two branches, each with its part of the channels, and MLP. (B, Y, X, dim) → same."""

    def __init__(
        self, dim: int, branches: Sequence[nn.Module], mlp_ratio: float, qkv_bias: bool, drop_path: float, **dd: Any
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.attns = nn.ModuleList(branches)
        self.part = dim // len(branches)
        self.proj = Linear(dim, dim, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).flatten(1, 2).chunk(3, dim=2)
        source = x.flatten(1, 2)
        outs: list[Tensor] = []
        for i, attn in enumerate(self.attns):
            a, b = i * self.part, (i + 1) * self.part
            outs.append(attn(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], source[:, :, a:b], (x.shape[1], x.shape[2])))
        x = x + self.drop_path1(self.proj(torch.cat(outs, 2)).view(x.shape))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Embed(nn.Module):
    """Overlapping windows become tokens, then a norm. (B, C, Y, X) → (B, dim, Y/stride, X/stride)."""

    def __init__(self, in_chans: int, dim: int, kernel: int, stride: int, padding: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, dim, kernel, stride=stride, padding=padding, **dd)
        self.norm = LayerNorm2d(dim, eps=EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class CSwin(StagedBackbone):
    """The classification network and, through timm's feature interfaces, a backbone for any resolution.

    Args:
        depths, num_heads: of each stage; the width doubles from stage to stage.
        attention: ``"agent"``, ``"inline"`` or ``"softmax"`` (stripes), for all blocks, each stage, or each block of
            a stage.
        agents: agent tokens of each stage that has agent attention, square numbers.
        split: width of the stripes of each stage but the last, whose softmax attention sees the whole map.
        img_size: the image that bias tables are made for; other sizes work, with stretched tables.

    Raises:
        ValueError: options that contradict each other or the widths.
    """

    def __init__(
        self,
        depths: Sequence[int] = (2, 4, 18, 1),
        embed_dim: int = 64,
        num_heads: Sequence[int] = (2, 4, 8, 16),
        *,
        attention: AttentionOption = "softmax",
        agents: Sequence[int] = (9, 16, 49, 49),
        split: Sequence[int] = (1, 2, 7),
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        count = len(depths)
        kinds = kinds_of_blocks("CSwin", attention, depths)
        needed = agents if any("agent" in blocks for blocks in kinds) else depths
        if not len(num_heads) == len(needed) == len(split) + 1 == count:
            raise ValueError(
                f"CSwin: num_heads and agents must have one entry for each of {count} stages, split one less, "
                f"got {num_heads}, {agents}, {split}"
            )
        if min(split, default=1) < 1:
            raise ValueError(f"CSwin: split must be positive, got split={split}")
        dims = [embed_dim << i for i in range(count)]
        image = image_grid("CSwin", img_size)

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = []
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()

        def branches(i: int, kind: Any) -> list[nn.Module]:
            dim, heads, grid = dims[i], num_heads[i], (image[0] // (4 << i), image[1] // (4 << i))
            if kind != "softmax":
                number = agents[i] if kind == "agent" else 0
                return [token_mixing(kind, dim, heads, grid, number, lepe=True, **dd)]
            if i == count - 1 or split[i] == grid[0] == grid[1]:
                return [StripeAttention(dim, heads, 0, 0, **dd)]
            if heads % 2:
                raise ValueError(f"CSwin: num_heads must be even where there are stripes, got {heads} in stage {i}")
            return [
                StripeAttention(dim // 2, heads // 2, 0, split[i], **dd),
                StripeAttention(dim // 2, heads // 2, split[i], 0, **dd),
            ]

        for dim, heads in zip(dims, num_heads, strict=True):
            if dim % heads:
                raise ValueError(f"CSwin: num_heads must divide the width of its stage, got {heads} and {dim}")
        self.min_side = 3
        self.stem = Embed(in_chans, dims[0], 7, 4, 2, **dd)
        stages: list[nn.Module] = []
        for i, dim in enumerate(dims):
            downsample = Embed(dims[i - 1], dim, 3, 2, 1, **dd) if i else nn.Identity()
            blocks = [Block(dim, branches(i, kind), mlp_ratio, qkv_bias, rates.pop(0), **dd) for kind in kinds[i]]
            stages.append(Stage(downsample, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": 4 << i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(dims[-1], eps=EPS, **dd)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.apply(init_linear)

    @property
    def fixed_size(self) -> str:
        """Why an exported graph serves one image size alone; empty where it serves all."""
        stripes = any(isinstance(m, StripeAttention) and (m.rows, m.columns) != (0, 0) for m in self.modules())
        return WINDOWS if stripes else ""

    def fit_table(self, name: str, value: Tensor) -> Tensor:
        """A checkpoint's value of a parameter; agent tables of another grid stretched to ours."""
        return fit_table(self, name, value)


KEY_MAP: KeyMap = {
    "cswin": (
        (r"^stem\.conv\.", "stage1_conv_embed.0."),
        (r"^stem\.norm\.", "stage1_conv_embed.2."),
        (r"^stages\.(\d)\.downsample\.", r"merge\1."),
        *((rf"^stages\.{i}\.blocks\.", f"stage{i + 1}.") for i in (0, 1, 2, 3)),
        (r"\.dwc\.", ".get_v."),
        (r"^head\.fc\.", "head."),
    ),
}
CSwin.key_map = KEY_MAP

_DEEP = (3, 6, 29, 2)
_BASE: dict[str, Any] = {"depths": _DEEP, "embed_dim": 96, "num_heads": (4, 8, 16, 32)}
_384 = {"img_size": 384, "split": (1, 2, 12)}
_TEST: dict[str, Any] = {"depths": (1, 1, 2, 1), "embed_dim": 12, "num_heads": (2, 2, 4, 8), "split": (1, 2, 3)}
VARIANTS: dict[str, dict[str, Any]] = {
    f"{kind}_cswin_{size}": {**options, "attention": (kind, kind, "softmax", "softmax")}
    for kind in ("agent", "inline")
    for size, options in {"tiny": {}, "small": {"depths": _DEEP}, "base": _BASE, "base_384": {**_BASE, **_384}}.items()
}
for _kind in ("agent", "inline"):
    VARIANTS[f"test_{_kind}_cswin"] = {**_TEST, "img_size": 96, "attention": (_kind, _kind, "softmax", "softmax")}


default_cfgs = host_cfgs(VARIANTS, first_conv="stem.conv")

CARDS = {
    "agent_cswin_tiny": AGENT("20.5 M parameters, 4.3 G multiply-adds at 224²", "top-1 83.1 %"),
    "agent_cswin_small": AGENT("32.8 M parameters, 6.8 G multiply-adds at 224²", "top-1 83.9 %"),
    "agent_cswin_base": AGENT("73.2 M parameters, 14.9 G multiply-adds at 224²", "top-1 84.7 %"),
    "agent_cswin_base_384": AGENT("73.3 M parameters, 46.3 G multiply-adds at 384²", "top-1 85.8 %"),
    "inline_cswin_tiny": INLINE("20.6 M parameters, 4.3 G multiply-adds at 224²", "top-1 83.2 %"),
    "inline_cswin_small": INLINE("33.0 M parameters, 6.8 G multiply-adds at 224²", "top-1 83.8 %"),
    "inline_cswin_base": INLINE("73.4 M parameters, 14.9 G multiply-adds at 224²", "top-1 84.5 %"),
    "inline_cswin_base_384": INLINE("73.4 M parameters at 384²; fine-tuned from 224²"),
    "test_agent_cswin": AGENT("Small enough for tests (< 0.5 M parameters)"),
    "test_inline_cswin": INLINE("Small enough for tests (< 0.5 M parameters)"),
}
ENTRIES = timm_entries(CSwin, VARIANTS, CARDS, default_cfgs)
