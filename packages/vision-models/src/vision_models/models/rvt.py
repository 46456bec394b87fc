"""RVT with TAP: a robust vision transformer whose attention reads tokens mixed with their neighborhoods.

Papers: Guo, Stutz, Schiele, Robustifying Token Attention for Vision Transformers, ICCV 2023, arXiv 2303.11126 (TAP and
ADL); the host is Mao et al., Towards Robust Vision Transformer, CVPR 2022, arXiv 2105.07926. Official code:
guoyongcs/TAPADL, ``TAPADL_RVT/tap_robust_models.py``.

The same as there: every number. What attention reads is pooled, what the residual adds is not. In the first
``masked_blocks`` of the first stage scores are multiplied, before the softmax, by the sigmoid of a table with one entry
for each pair of tokens. The classifier's norm stands behind pooling.

What differs: any image size works. Tables of pairs are stretched bicubically along both tokens, where the official code
takes the corner of the table on smaller maps and fails on larger ones. Stochastic depth grows to its rate in the last
block, where it stops one step before. The code's base model has masks in 5 blocks and 89.4 M parameters; the 92.1 M
published are those of masks in 11 (``masked_blocks=11``). Without ``scales`` this is RVT itself.

Numbers are checked in ``tests/models/test_tap.py`` against a plain network.

Shapes: image (B, 3, Y, X) → logits (B, num_classes); maps (B, C_i, ~Y/s, ~X/s), s = 16 (and 32 for the tiny ones).
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, NormMlpClassifierHead
from timm.models import generate_default_cfgs, register_notrace_module
from torch import Tensor, nn

from attn_core import attention as attend
from attn_core.catalog import Card
from attn_core.weights import KeyMap
from vision_models.backbone import Stage, StagedBackbone
from vision_models.initialization import trunc_normal_
from vision_models.layers.token_maps import DepthwiseConv, Linear
from vision_models.layers.token_pooling import ObservedAttention, TokenPooling
from vision_models.registration import STAGES, pretrained_cfg, timm_entries

__all__ = ["RVT"]

EPS = 1e-6


def stretched_pairs(table: Tensor, built: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """A table (heads, N, N) of pairs of tokens of the grid ``built`` for another grid, (heads, N', N')."""
    if built == grid and not torch.compiler.is_exporting():  # an exported graph stretches always: any size may come
        return table
    for _ in range(2):  # along the second token, then the axes trade places
        cells = F.interpolate(table.unflatten(2, built), size=grid, mode="bicubic")
        table = cells.flatten(2).mT
    return table


@register_notrace_module  # the table depends on the size of the map
class MaskedAttention(ObservedAttention):
    """Softmax attention of the whole map; with ``grid`` its scores are gated by a table. (B, Y, X, dim) → same.

    Args:
        grid: rows and columns of the map that the table is made for, another map stretches it; None: no table.
    """

    def __init__(
        self, dim: int, num_heads: int, grid: tuple[int, int] | None, *, qkv_bias: bool = True, **dd: Any
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.grid = grid
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.att_mask = None
        if grid is not None:
            table = torch.empty(num_heads, grid[0] * grid[1], grid[0] * grid[1], **dd)
            self.att_mask = nn.Parameter(trunc_normal_(table, std=0.02, a=-0.02, b=0.02))

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, Y·X, D)."""
        q, k, v = self.qkv(x).flatten(1, 2).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def gate(self, grid: tuple[int, int]) -> Tensor | None:
        """(heads, Y·X, Y·X) in (0, 1), or None."""
        if self.att_mask is None or self.grid is None:
            return None
        return stretched_pairs(self.att_mask, self.grid, grid).sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, dim) → same."""
        q, k, v = self.projected(x)
        gate = self.gate((x.shape[1], x.shape[2]))
        self.note(q, k, gate)
        if gate is None:
            out = attend(q, k, v)[0]
        else:  # the table itself has an entry for each pair, so that holding the scores changes no order of memory
            out = (q @ k.mT * q.shape[3] ** -0.5 * gate).softmax(3) @ v
        return self.proj(out.transpose(1, 2).reshape(x.shape))


class ConvMlp(nn.Module):
    """1×1, depthwise 3×3 and 1×1 convolutions with batch norms, GELUs between them. (B, Y, X, dim) → same."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden, 1, **dd)
        self.bn1 = nn.BatchNorm2d(hidden, **dd)
        self.dwconv = DepthwiseConv(hidden, 3, **dd)
        self.bn2 = nn.BatchNorm2d(hidden, **dd)
        self.fc2 = nn.Conv2d(hidden, dim, 1, **dd)
        self.bn3 = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.bn1(self.fc1(x.permute(0, 3, 1, 2))))
        x = self.dwconv(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.bn3(self.fc2(F.gelu(self.bn2(x)))).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Attention to pooled tokens, MLP, each with a residual. (B, Y, X, dim) → same."""

    def __init__(self, dim: int, pooling: nn.Module, attn: nn.Module, hidden: int, drop_path: float, **dd: Any) -> None:
        super().__init__()
        self.pooling = pooling
        self.norm1 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.mlp = ConvMlp(dim, hidden, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(self.pooling(x))))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


class Stem(nn.Module):
    """7×7 convolution of stride 2, batch norm, max pooling of stride 2, patches of 4. (B, 3, Y, X) → (B, dim, …).

    With ``patch_size=4`` the patches are single tokens of the pooled map.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, **dd: Any) -> None:
        super().__init__()
        last = patch_size // 4
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, 32, 7, stride=2, padding=2, **dd),
            nn.BatchNorm2d(32, **dd),
            nn.MaxPool2d(3, stride=2, padding=1),
            nn.Conv2d(32, dim, last, stride=last, **dd),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Downsample(nn.Module):
    """Depthwise 3×3 convolution of stride 2 with dim/C outputs a channel. (B, C, Y, X) → (B, dim, Y/2, X/2)."""

    def __init__(self, before: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(before, dim, 3, stride=2, padding=1, groups=before, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class RVT(StagedBackbone):
    """The classification network and, through timm's feature interfaces, a backbone for any resolution.

    Args:
        depths, num_heads, head_dims: of each stage; the width is their product, and a multiple of that before.
        patch_size: pixels between tokens of the first stage: 4 or 16.
        masked_blocks: blocks of the first stage whose scores a table gates; 0: none ("plus" models have them).
        img_size: the image that those tables are made for; other sizes stretch them.
        scales: tokens and dilated means that attention reads a mix of; None: tokens alone, which is RVT.
        temperature: of the weights of that mix.

    Raises:
        ValueError: options that contradict each other or the widths.
    """

    def __init__(
        self,
        depths: Sequence[int] = (12,),
        num_heads: Sequence[int] = (12,),
        head_dims: Sequence[int] = (64,),
        *,
        patch_size: int = 16,
        masked_blocks: int = 0,
        img_size: int = 224,
        scales: int | None = 4,
        temperature: float = 1.0,
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
        if not len(num_heads) == len(head_dims) == len(depths):
            raise ValueError(
                f"RVT: num_heads and head_dims must have one entry for each of {len(depths)} stages, "
                f"got {tuple(num_heads)}, {tuple(head_dims)}"
            )
        if patch_size not in (4, 16):
            raise ValueError(f"RVT: patch_size must be 4 or 16, got patch_size={patch_size}")
        if not 0 <= masked_blocks <= depths[0]:
            raise ValueError(
                f"RVT: masked_blocks must lie between 0 and {depths[0]}, got masked_blocks={masked_blocks}"
            )
        dims = [heads * width for heads, width in zip(num_heads, head_dims, strict=True)]
        for before, dim in pairwise(dims):
            if dim % before:
                raise ValueError(f"RVT: the width of a stage must be a multiple of that before, got {before} and {dim}")
        self.min_side = 15 if patch_size == 16 else 3
        if img_size < self.min_side:
            raise ValueError(f"RVT: img_size must be at least {self.min_side}, got img_size={img_size}")

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = []
        side = ((img_size - 3) // 2 // 2 + 1) // (patch_size // 4)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()

        def block(stage: int, number: int) -> Block:
            dim = dims[stage]
            grid = (side, side) if stage == 0 and number < masked_blocks else None
            attn = MaskedAttention(dim, num_heads[stage], grid, qkv_bias=qkv_bias, **dd)
            pooling = nn.Identity() if scales is None else TokenPooling(dim, scales, temperature=temperature, **dd)
            return Block(dim, pooling, attn, int(dim * mlp_ratio), rates.pop(0), **dd)

        self.stem = Stem(in_chans, dims[0], patch_size, **dd)
        stages: list[nn.Module] = []
        for i, depth in enumerate(depths):
            downsample = Downsample(dims[i - 1], dims[i], **dd) if i else nn.Identity()
            stages.append(Stage(downsample, [block(i, j) for j in range(depth)]))
            self.feature_info.append({"num_chs": dims[i], "reduction": patch_size << i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = nn.Identity()  # it stands behind pooling
        self.head = NormMlpClassifierHead(
            dims[-1],
            num_classes,
            pool_type=global_pool,
            drop_rate=drop_rate,
            norm_layer=partial(LayerNorm2d, eps=EPS),
            **dd,
        )

    def fit_table(self, name: str, value: Tensor) -> Tensor:
        """A checkpoint's value of a parameter; a table of pairs of another square map stretched to ours."""
        if not name.endswith(".att_mask"):
            return value
        own: Any = self.get_submodule(name.rpartition(".")[0])
        side = int(value.shape[-1] ** 0.5)
        if value.ndim != 3 or value.shape[1] != value.shape[2] or side * side != value.shape[2]:
            return value
        return stretched_pairs(value, (side, side), own.grid)


# The official stage ends with the downsampling that ours begins with.
KEY_MAP: KeyMap = {
    "tapadl": (
        (r"^stem\.", "patch_embed."),
        *((rf"^stages\.{i + 1}\.downsample\.", f"pools.{i}.") for i in range(3)),
        (r"^stages\.", "transformers."),
        (r"\.pooling\.", ".dilation_predictor."),
        (r"^head\.norm\.", "norm."),
        (r"^head\.fc\.", "head."),
    )
}
RVT.key_map = KEY_MAP

_TINY: dict[str, Any] = {"depths": (10, 2), "num_heads": (6, 12), "head_dims": (32, 32)}
_SMALL: dict[str, Any] = {"num_heads": (6,)}
VARIANTS: dict[str, dict[str, Any]] = {
    "tap_rvt_tiny": _TINY,
    "tap_rvt_tiny_plus": {**_TINY, "masked_blocks": 10},
    "tap_rvt_small": _SMALL,
    "tap_rvt_small_plus": {**_SMALL, "masked_blocks": 5},
    "tap_rvt_base": {},
    "tap_rvt_base_plus": {"masked_blocks": 5},
    "test_tap_rvt": {
        "depths": (1, 2, 1, 1),
        "num_heads": (1, 2, 2, 4),
        "head_dims": (12, 12, 12, 12),
        "patch_size": 4,
        "masked_blocks": 1,
        "img_size": 32,
    },
}


def _cfg(name: str) -> dict[str, Any]:
    side = 14 // len(VARIANTS[name].get("depths", (12,)))
    return pretrained_cfg(
        pool_size=(7, 7) if name.startswith("test") else (side, side),
        first_conv="stem.proj.0",
        license="mit",
        paper_ids=f"arXiv:{TAP_CARD.paper}",
        origin_url=TAP_CARD.code,
    )


TAP_CARD = Card(
    family="TAP and ADL",
    paper="2303.11126",
    code="https://github.com/guoyongcs/TAPADL",
    license="MIT",
    test="models/test_tap.py",
)
CARDS = {
    "tap_rvt_tiny": TAP_CARD("In RVT-Ti: 8.7 M parameters"),
    "tap_rvt_tiny_plus": TAP_CARD("In RVT-Ti*: 11.0 M parameters"),
    "tap_rvt_small": TAP_CARD("In RVT-S: 22.3 M parameters"),
    "tap_rvt_small_plus": TAP_CARD("In RVT-S*: 23.5 M parameters, 4.7 G multiply-adds at 224²"),
    "tap_rvt_base": TAP_CARD("In RVT-B: 87.1 M parameters"),
    "tap_rvt_base_plus": TAP_CARD("In RVT-B*: 89.4 M parameters", "top-1 83.1 % (92.1 M), mCE 44.7 %"),
    "test_tap_rvt": TAP_CARD("Small enough for tests (< 0.5 M parameters)"),
}
default_cfgs = generate_default_cfgs({name: _cfg(name) for name in VARIANTS})
ENTRIES = timm_entries(
    RVT,
    VARIANTS,
    CARDS,
    default_cfgs,
    maps=lambda name: {**STAGES, "out_indices": tuple(range(len(VARIANTS[name].get("depths", (12,)))))},
)
