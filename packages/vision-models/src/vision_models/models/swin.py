"""Agent-Swin and InLine-Swin: Swin Transformers whose first stages attend to the whole map at linear cost.

Papers: Han et al., Agent Attention, ECCV 2024, arXiv 2312.08874; Han et al., Bridging the Divide, NeurIPS 2024, arXiv
2412.06590; the host is Liu et al., Swin Transformer, ICCV 2021, arXiv 2103.14030. Official code:
LeapLabTHU/Agent-Attention, ``agent_transformer/models/agent_swin.py`` and ``downstream``; LeapLabTHU/InLine,
``models/inline_swin.py``.

The same as there: every number. The official files differ in the attention alone, so one host takes any of them for
each block: ``"agent"`` and ``"inline"`` see the whole map, ``"softmax"`` windows, shifted in every second block unless
the map is no larger than one. With ``attention="softmax"`` this is Swin itself.

What differs: token maps stay channels-last; any image size works, odd maps being padded as in the official detection
code (padding enters a window after the norm, unmasked). The kinds are written out where the official options say
``AAMB2``: ``("agent", "agent", ("agent",) * 2 + ("softmax",) * 16, "softmax")``.

Numbers are checked in ``tests/models/test_hosts.py`` against a plain network, in ``tests/models/test_swin.py`` against
timm's.

Shapes: image (B, 3, Y, X) → logits (B, num_classes); maps (B, C_i, ⌈Y/s⌉, ⌈X/s⌉) with s = 4, 8, 16, 32.
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
from vision_models.backbone import WINDOWS, Dense, Stage, StagedBackbone
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
from vision_models.layers.token_maps import (
    Linear,
    Mlp,
    from_windows,
    init_linear,
    pad_map,
    pad_to_multiple,
    to_windows,
)
from vision_models.registration import timm_entries

__all__ = ["Swin", "SwinDense"]

EPS = 1e-5


@register_notrace_module  # windows and their masks depend on the size of the map
class WindowAttention(nn.Module):
    """Softmax attention within windows, with a bias for each relative position. (B, Y, X, dim) → same.

    Args:
        shift: rows and columns that windows are moved by, on maps larger than a window; tokens from opposite borders
            do not see each other.
    """

    relative_position_index: Tensor

    def __init__(self, dim: int, num_heads: int, window: int, shift: int, qkv_bias: bool, **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.window = window
        self.shift = shift
        self.always_shift = False  # also maps no larger than a window, as the official detection code
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)
        table = torch.empty((2 * window - 1) ** 2, num_heads, **dd)
        self.relative_position_bias_table = nn.Parameter(trunc_normal_(table, std=0.02))
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        cells = torch.stack([y.flatten(), x.flatten()])
        row, column = (cells[:, :, None] - cells[:, None] + window - 1).unbind(0)
        index = (row * (2 * window - 1) + column).to(dd.get("device"))
        self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        height, width, window = x.shape[1], x.shape[2], self.window
        shift = self.shift if self.always_shift or min(height, width) > window else 0
        shifted = pad_to_multiple(x, window, window)
        if shift > 0:
            shifted = torch.roll(shifted, (-shift, -shift), (1, 2))
        qkv = self.qkv(to_windows(shifted, window, window))
        count, tokens, channels = qkv.shape
        bias = self.relative_position_bias_table[self.relative_position_index].permute(2, 0, 1).unsqueeze(0)
        heads = self.num_heads
        if shift > 0:  # windows join the heads, so that one mask serves all images
            mask = self.mask(shifted.shape[1], shifted.shape[2], shift, qkv.device)
            bias = bias.masked_fill(mask.unsqueeze(1), float("-inf")).flatten(0, 1).unsqueeze(0)
            heads = bias.shape[1]
        windows, dim = shifted.shape[1] * shifted.shape[2] // tokens, channels // (3 * self.num_heads)
        qkv = qkv.view(x.shape[0], windows, tokens, 3, self.num_heads, dim).permute(3, 0, 1, 4, 2, 5)
        q, k, v = qkv.reshape(3, count * self.num_heads // heads, heads, tokens, dim).unbind(0)
        out = attend(q, k, v, bias=bias)[0]
        out = out.reshape(count, self.num_heads, tokens, dim).transpose(1, 2).reshape(count, tokens, channels // 3)
        out = from_windows(self.proj(out), window, window, shifted)
        if shift > 0:
            out = torch.roll(out, (shift, shift), (1, 2))
        return out[:, :height, :width]

    def mask(self, height: int, width: int, shift: int, device: torch.device) -> Tensor:
        """(windows, N, N), true where a window joins tokens from opposite borders of the map."""
        # What came round stands in the last windows, which alone hold both kinds.
        row = (torch.arange(height, device=device) >= height - shift).long()
        column = (torch.arange(width, device=device) >= width - shift).long()
        region = (2 * row[:, None] + column)[None, :, :, None]
        region = to_windows(region, self.window, self.window)[:, :, 0]
        return region[:, :, None] != region[:, None]


class GlobalAttention(nn.Module):
    """Agent or InLine attention of the whole map between projections. (B, Y, X, dim) → same."""

    def __init__(self, dim: int, mixing: nn.Module, qkv_bias: bool, **dd: Any) -> None:
        super().__init__()
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.mixing = mixing
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).flatten(1, 2).chunk(3, dim=2)
        out = self.mixing(q, k, v, x.flatten(1, 2), (x.shape[1], x.shape[2]))
        return self.proj(out).view(x.shape)


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


class Stem(nn.Module):
    """4×4 patches of the image padded to a multiple of 4, then a norm. (B, 3, Y, X) → (B, dim, Y/4, X/4)."""

    def __init__(self, in_chans: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, 4, stride=4, **dd)
        self.norm = LayerNorm2d(dim, eps=EPS, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.proj(pad_map(x, 4)))


class Downsample(nn.Module):
    """Four neighbors, of a map padded to an even size, become one token. (B, C, Y, X) → (B, 2·C, Y/2, X/2)."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim, eps=EPS, **dd)
        self.reduction = Linear(4 * dim, 2 * dim, bias=False, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = pad_map(x, 2).permute(0, 2, 3, 1)
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], 3)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


class Swin(StagedBackbone):
    """The classification network and, through timm's feature interfaces, a backbone for any resolution.

    Args:
        depths, num_heads: of each stage; the width doubles from stage to stage.
        attention: ``"agent"``, ``"inline"`` or ``"softmax"`` (windows), for all blocks, each stage, or each block of
            a stage.
        agents: agent tokens of each stage that has agent attention, square numbers.
        agent_shapes: rows and columns of another grid of agents for each stage, for large images.
        img_size: the image that bias tables are made for; other sizes work, with stretched tables.
        window: side of a softmax window; by default 7, and 1/32 of larger images. Stages whose map for ``img_size``
            is smaller have one window of its size.

    Raises:
        ValueError: options that contradict each other or the widths.
    """

    official_buffers = ("relative_position_index", "attn_mask")
    undecayed = ("relative_position_bias_table",)

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        embed_dim: int = 96,
        num_heads: Sequence[int] = (3, 6, 12, 24),
        *,
        attention: AttentionOption = "softmax",
        agents: Sequence[int] = (9, 16, 49, 49),
        agent_shapes: Sequence[tuple[int, int]] | None = None,
        img_size: int | Sequence[int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        window: int | None = None,
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
        kinds = kinds_of_blocks("Swin", attention, depths)
        needed = agents if any("agent" in blocks for blocks in kinds) else depths
        if not len(num_heads) == len(needed) == len(agent_shapes or depths) == count:
            raise ValueError(
                f"Swin: num_heads, agents and agent_shapes must have one entry for each of {count} stages, "
                f"got {num_heads}, {agents}, {agent_shapes}"
            )
        dims = [embed_dim << i for i in range(count)]
        for dim, heads in zip(dims, num_heads, strict=True):
            if dim % heads:
                raise ValueError(f"Swin: num_heads must divide the width of its stage, got {heads} and {dim}")
        image = image_grid("Swin", img_size)
        side = max(7, min(image) // 32) if window is None else window
        if side < 1:
            raise ValueError(f"Swin: window must be positive, got window={window}")

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = []
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()

        def block(i: int, j: int) -> Block:
            grid = -(-image[0] // (4 << i)), -(-image[1] // (4 << i))
            if kinds[i][j] == "softmax":
                size = min(side, *grid)
                shift = size // 2 if j % 2 else 0
                attn: nn.Module = WindowAttention(dims[i], num_heads[i], size, shift, qkv_bias, **dd)
            else:
                shape = agent_shapes[i] if agent_shapes else None
                number = agents[i] if kinds[i][j] == "agent" else 0
                mixing = token_mixing(kinds[i][j], dims[i], num_heads[i], grid, number, agent_shape=shape, **dd)
                attn = GlobalAttention(dims[i], mixing, qkv_bias, **dd)
            return Block(dims[i], attn, mlp_ratio, rates.pop(0), **dd)

        self.stem = Stem(in_chans, dims[0], **dd)
        stages: list[nn.Module] = []
        for i, depth in enumerate(depths):
            downsample = Downsample(dims[i - 1], **dd) if i else nn.Identity()
            stages.append(Stage(downsample, [block(i, j) for j in range(depth)]))
            self.feature_info.append({"num_chs": dims[i], "reduction": 4 << i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = LayerNorm2d(dims[-1], eps=EPS, **dd)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.apply(init_linear)

    @property
    def fixed_size(self) -> str:
        """Why an exported graph serves one image size alone; empty where it serves all."""
        windows = any(isinstance(module, WindowAttention) for module in self.modules())
        return WINDOWS if windows else ""

    def fit_table(self, name: str, value: Tensor) -> Tensor:
        """A checkpoint's value of a parameter; agent tables of another grid stretched to ours."""
        return fit_table(self, name, value)


class SwinDense(Dense, Swin):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Backbone for detection and segmentation: four maps, each with a LayerNorm of its own on the way out.

    As in the official detection code, windows are shifted on maps of any size.

    Args:
        variant: name of the classification variant to start from; ``options`` override its constructor arguments (the
            official recipes: ``agent_shapes=((9, 9), (12, 12), (14, 14), (7, 7))``).

    Shapes: image (B, 3, Y, X) → tuple of (B, C_i, ⌈Y/s⌉, ⌈X/s⌉), s = 4, 8, 16, 32.
    Raises: ValueError for an unknown variant.
    """

    out_eps = EPS

    def __init__(self, variant: str = "agent_swin_tiny", **options: Any) -> None:
        super().__init__(variant, **options)
        for module in self.modules():
            if isinstance(module, WindowAttention):
                module.always_shift = True  # pyright: ignore[reportArgumentType]


KEY_MAP: KeyMap = {
    "swin": (
        (r"^stem\.", "patch_embed."),
        # the official stage ends with the downsampling that ours begins with
        (r"^stages\.1\.downsample\.", "layers.0.downsample."),
        (r"^stages\.2\.downsample\.", "layers.1.downsample."),
        (r"^stages\.3\.downsample\.", "layers.2.downsample."),
        (r"^stages\.", "layers."),
        (r"\.attn\.mixing\.", ".attn."),
        (r"^out_norms\.(\d)\.", r"norm\1."),
        (r"^head\.fc\.", "head."),
    ),
}
Swin.key_map = KEY_MAP

_DEEP = (2, 2, 18, 2)
_BASE: dict[str, Any] = {"depths": _DEEP, "embed_dim": 128, "num_heads": (4, 8, 16, 32)}


def _first_two(kind: str) -> tuple[Any, ...]:
    """The attention of the base models: two blocks of the third stage are still global."""
    return (kind, kind, (kind,) * 2 + ("softmax",) * 16, "softmax")


_TEST: dict[str, Any] = {"depths": (1, 1, 2, 2), "embed_dim": 12, "num_heads": (1, 2, 4, 4), "img_size": 96}
VARIANTS: dict[str, dict[str, Any]] = {
    "agent_swin_tiny": {"attention": ("agent", "agent", "agent", "softmax")},
    "agent_swin_small": {"depths": _DEEP, "attention": ("agent", "agent", "softmax", "softmax")},
    "agent_swin_small_288": {"depths": _DEEP, "attention": ("agent", "agent", "softmax", "softmax"), "img_size": 288},
    "agent_swin_base": {**_BASE, "attention": _first_two("agent")},
    "agent_swin_base_384": {**_BASE, "attention": _first_two("agent"), "img_size": 384},
    "inline_swin_tiny": {"attention": ("inline", "inline", "inline", "softmax")},
    "inline_swin_small": {"depths": _DEEP, "attention": ("inline", "inline", "softmax", "softmax")},
    "inline_swin_base": {**_BASE, "attention": _first_two("inline")},
    "inline_swin_base_384": {**_BASE, "attention": _first_two("inline"), "img_size": 384},
    "test_agent_swin": {**_TEST, "attention": ("agent", "agent", ("agent", "softmax"), "softmax")},
    "test_inline_swin": {**_TEST, "attention": ("inline", "inline", ("inline", "softmax"), "softmax")},
}

SwinDense.variants = VARIANTS

default_cfgs = host_cfgs(VARIANTS, first_conv="stem.proj", large_crop_pct=1.0)

CARDS = {
    "agent_swin_tiny": AGENT("28.9 M parameters, 4.5 G multiply-adds at 224²", "top-1 82.6 %"),
    "agent_swin_small": AGENT("49.7 M parameters, 8.7 G multiply-adds at 224²", "top-1 83.7 %"),
    "agent_swin_small_288": AGENT("49.7 M parameters, 14.6 G multiply-adds at 288²", "top-1 84.1 %"),
    "agent_swin_base": AGENT("88.1 M parameters, 15.4 G multiply-adds at 224²", "top-1 84.0 %"),
    "agent_swin_base_384": AGENT("88.3 M parameters, 46.3 G multiply-adds at 384²", "top-1 84.9 %"),
    "inline_swin_tiny": INLINE("29.2 M parameters, 4.5 G multiply-adds at 224²", "top-1 82.4 %"),
    "inline_swin_small": INLINE("49.8 M parameters, 8.7 G multiply-adds at 224²", "top-1 83.6 %"),
    "inline_swin_base": INLINE("88.4 M parameters, 15.4 G multiply-adds at 224²", "top-1 84.1 %"),
    "inline_swin_base_384": INLINE("88.5 M parameters at 384²; fine-tuned from 224²"),
    "test_agent_swin": AGENT("Small enough for tests (< 0.5 M parameters)"),
    "test_inline_swin": INLINE("Small enough for tests (< 0.5 M parameters)"),
}
ENTRIES = timm_entries(Swin, VARIANTS, CARDS, default_cfgs)
