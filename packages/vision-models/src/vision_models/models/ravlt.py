"""RAVLT: linear attention of augmented rank in early stages, softmax attention in late ones, both gated.

Paper: Fan et al., Breaking the Low-Rank Dilemma of Linear Attention, CVPR 2025, arXiv 2411.07635. Official code:
qhfan/RALA, ``classfication/RALA.py``.

The same as there: every number. The released networks have RALA in stages 1 and 2 and softmax attention, with the same
projections and rotary positions, in stages 3 and 4; ``attention="linear"`` is the paper's network throughout, for which
there are no weights. The gate is the raw fourth projection, without an activation.

What differs: token maps stay channels-last; attention is attn_core's, so that no block holds N×N scores; the map behind
the last projection is what ``forward_features`` gives, and the classifier is a linear layer. Angles of the rotation are
computed, not read from checkpoints, and stay float32 in half precision.

Numbers are checked in ``tests/models/test_ravlt.py`` against a plain network with all scores in full.

Shapes: image (B, 3, Y, X) → logits (B, num_classes); maps (B, C_i, ⌈Y/s⌉, ⌈X/s⌉) with s = 4, 8, 16, 32.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath
from timm.models import generate_default_cfgs, register_notrace_function
from torch import Tensor, nn

from attn_core import attention as softmax_attention
from attn_core import rank_augmented_attention
from attn_core.catalog import Card
from attn_core.weights import KeyMap
from vision_models.backbone import Dense, Stage, StagedBackbone
from vision_models.initialization import trunc_normal_
from vision_models.layers.token_maps import DepthwiseConv, Linear, through_gelu
from vision_models.registration import pretrained_cfg, timm_entries

__all__ = ["RAVLT", "RAVLTDense"]

AttentionKind = Literal["linear", "softmax"]
EPS = 1e-6


def rotation(height: int, width: int, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Sines and cosines (Y·X, D) of two-dimensional rotary positions: the first half of D turns with the row.

    float64 if ``like`` is, else float32; the frequencies are rounded to float32 as in the official buffers.
    """
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    exponent = torch.linspace(0.0, 1.0, head_dim // 4, dtype=torch.float32, device=like.device)
    frequency = (1.0 / (10000.0**exponent)).to(dtype).repeat_interleave(2)
    rows = torch.arange(height, device=like.device).to(dtype)[:, None] * frequency
    columns = torch.arange(width, device=like.device).to(dtype)[:, None] * frequency
    angle = torch.cat(
        [rows[:, None].expand(height, width, head_dim // 2), columns[None].expand(height, width, head_dim // 2)], dim=-1
    ).flatten(0, 1)
    return angle.sin(), angle.cos()


def rotated(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Turn the pairs (x_0, x_1), (x_2, x_3), … of the last dimension."""
    odd, even = x[..., 1::2], x[..., ::2]
    turned = x * cos + torch.stack([-odd, even], dim=-1).flatten(-2) * sin
    return turned.to(x.dtype)


@register_notrace_function
def mix_tokens(qkv: Tensor, num_heads: int, linear: bool) -> Tensor:
    """Attention over the whole map: (B, Y, X, 3·C) → (B, Y, X, C)."""
    batch, height, width, channels = qkv.shape
    qkv = qkv.reshape(batch, height * width, 3, num_heads, channels // (3 * num_heads)).permute(2, 0, 3, 1, 4)
    q, k, v = qkv[0], qkv[1], qkv[2]
    sin, cos = rotation(height, width, q.shape[3], q)
    if linear:
        out = rank_augmented_attention(q, k, v, sin=sin, cos=cos)
    else:
        q, k = rotated(q, sin, cos), rotated(k, sin, cos)
        out = softmax_attention(q, k, v)[0]
    return out.transpose(1, 2).reshape(batch, height, width, channels // 3)


class GatedAttention(nn.Module):
    """proj((attention(q, k, v) + depthwise(v)) ∘ o) (eq. 8 of the paper). (B, Y, X, dim) → same."""

    def __init__(self, dim: int, num_heads: int, kind: AttentionKind, **dd: Any) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = num_heads
        self.linear = kind == "linear"
        self.qkvo = Linear(dim, 4 * dim, **dd)
        self.lepe = DepthwiseConv(dim, 5, **dd)
        self.proj = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        qkvo = self.qkvo(x)
        mixed = mix_tokens(qkvo[..., : 3 * self.dim], self.num_heads, self.linear)
        mixed = mixed + self.lepe(qkvo[..., 2 * self.dim : 3 * self.dim])
        return self.proj(mixed * qkvo[..., 3 * self.dim :])


class FeedForward(nn.Module):
    """Linear, GELU, x + depthwise 3×3, linear. (B, Y, X, dim) → same."""

    def __init__(self, dim: int, hidden: int, **dd: Any) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden, **dd)
        self.dwconv = DepthwiseConv(hidden, 3, **dd)
        self.fc2 = Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = through_gelu(self.fc1, x)
        return self.fc2(x + self.dwconv(x))


class Block(nn.Module):
    """Positional convolution, attention, feed-forward, each with a residual. (B, Y, X, dim) → same."""

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, scale: float, drop_path: float, **dd: Any) -> None:
        super().__init__()
        self.pos = DepthwiseConv(dim, 3, **dd)
        self.norm1 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=EPS, **dd)
        self.ffn = FeedForward(dim, int(mlp_ratio * dim), **dd)
        self.gamma_1 = nn.Parameter(torch.full((dim,), scale, **dd))
        self.gamma_2 = nn.Parameter(torch.full((dim,), scale, **dd))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.pos(x)
        x = x + self.drop_path(self.gamma_1 * self.attn(self.norm1(x)))
        return x + self.drop_path(self.gamma_2 * self.ffn(self.norm2(x)))


class Downsample(nn.Module):
    """3×3 convolution with stride 2, batch norm. (B, C, Y, X) → (B, dim, ⌈Y/2⌉, ⌈X/2⌉)."""

    def __init__(self, in_dim: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(in_dim, dim, 3, stride=2, padding=1, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.reduction(x))


class Projection(nn.Module):
    """1×1 convolution, batch norm, SiLU: what stands between the last stage and the pooling."""

    def __init__(self, in_dim: int, dim: int, **dd: Any) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_dim, dim, 1, **dd)
        self.norm = nn.BatchNorm2d(dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.norm(self.proj(x)))


def _stem(in_chans: int, dim: int, **dd: Any) -> nn.Sequential:
    half = dim // 2
    layers: list[nn.Module] = []
    for channels, out, stride in ((in_chans, half, 2), (half, half, 1), (half, half, 1), (half, dim, 2)):
        layers += [nn.Conv2d(channels, out, 3, stride=stride, padding=1, **dd), nn.BatchNorm2d(out, **dd), nn.GELU()]
    return nn.Sequential(*layers[:-1])


class RAVLT(StagedBackbone):
    """The classification network and, through timm's feature interfaces, a backbone for any resolution.

    Args:
        depths: blocks per stage.
        dims: channels per stage.
        num_heads: per stage; each head's width must be a multiple of 4.
        attention: of all stages, or one for each.
        mlp_ratio: hidden channels of the feed-forward layer.
        layer_scale: start of the learned factor of each residual branch, one value or one per stage.
        proj_dim: channels before the pooling.

    Raises:
        ValueError: options that contradict each other or the widths.
    """

    official_buffers = ("RoPE.angle",)
    undecayed = ("gamma_1", "gamma_2")

    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 6, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        attention: AttentionKind | Sequence[AttentionKind] = ("linear", "linear", "softmax", "softmax"),
        mlp_ratio: float = 3.5,
        layer_scale: float | Sequence[float] = 1.0,
        proj_dim: int = 1024,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        kinds = [attention] * len(depths) if isinstance(attention, str) else list(attention)
        scales = [layer_scale] * len(depths) if isinstance(layer_scale, (int, float)) else list(layer_scale)
        for option, values in (("dims", dims), ("num_heads", num_heads), ("attention", kinds), ("layer_scale", scales)):
            if len(values) != len(depths):
                raise ValueError(f"RAVLT: {option} must have one entry for each of {len(depths)} stages, got {values}")
        unknown = [kind for kind in kinds if kind not in ("linear", "softmax")]
        if unknown:
            raise ValueError(f"RAVLT: attention must be 'linear' or 'softmax', got {unknown[0]!r}")
        for dim, heads in zip(dims, num_heads, strict=True):
            if dim % (4 * heads):
                raise ValueError(
                    f"RAVLT: the width of a head must be a multiple of 4, got {dim} channels, {heads} heads"
                )

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.feature_info = []
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()
        self.stem = _stem(in_chans, dims[0], **dd)
        stages: list[nn.Module] = []
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            downsample = Downsample(dims[i - 1], dim, **dd) if i else nn.Identity()
            blocks = [
                Block(
                    dim,
                    GatedAttention(dim, num_heads[i], kinds[i], **dd),  # pyright: ignore[reportArgumentType]
                    mlp_ratio,
                    float(scales[i]),
                    rates.pop(0),
                    **dd,
                )
                for _ in range(depth)
            ]
            stages.append(Stage(downsample, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": 4 << i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm = Projection(dims[-1], proj_dim, **dd)
        self.num_features = self.head_hidden_size = proj_dim
        self.head = ClassifierHead(proj_dim, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.apply(_init)

    def fit_table(self, name: str, value: Tensor) -> Tensor:
        """Official factors of the residual branches are (1, C, 1, 1)."""
        return value.flatten() if name.endswith((".gamma_1", ".gamma_2")) else value

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """As everywhere; without the projection in ``norm`` a new classifier reads the last stage."""
        take = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        if isinstance(self.norm, nn.Identity) and self.num_features != self.feature_info[take[-1]]["num_chs"]:
            self.num_features = self.feature_info[take[-1]]["num_chs"]
            self.reset_classifier(self.num_classes)
        return take


class RAVLTDense(Dense, RAVLT):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Backbone for detection and segmentation: four maps, each with a LayerNorm of its own on the way out.

    Args:
        variant: name of the classification variant to start from; ``options`` override its constructor arguments.

    Shapes: image (B, 3, Y, X) → tuple of (B, C_i, ⌈Y/s⌉, ⌈X/s⌉), s = 4, 8, 16, 32.
    Raises: ValueError for an unknown variant.
    """

    out_eps = EPS

    def __init__(self, variant: str = "ravlt_tiny", **options: Any) -> None:
        super().__init__(variant, **options)


def _init(module: nn.Module) -> None:
    """Truncated normal weights (0.02) and zero biases."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


KEY_MAP: KeyMap = {
    "rala": (
        (r"^stem\.", "patch_embed.proj."),
        # the official stage ends with the downsampling that ours begins with
        (r"^stages\.1\.downsample\.", "layers.0.downsample."),
        (r"^stages\.2\.downsample\.", "layers.1.downsample."),
        (r"^stages\.3\.downsample\.", "layers.2.downsample."),
        (r"^stages\.", "layers."),
        (r"\.norm([12])\.", r".norm\1.norm."),
        (r"^out_norms\.(\d)\.", r"extra_norms.\1.norm."),
        (r"^norm\.", ""),
        (r"^head\.fc\.", "head."),
    )
}
RAVLT.key_map = KEY_MAP

VARIANTS: dict[str, dict[str, Any]] = {
    "ravlt_tiny": {},
    "ravlt_small": {"depths": (3, 5, 9, 3), "dims": (64, 128, 320, 512), "num_heads": (1, 2, 5, 8)},
    "ravlt_base": {
        "depths": (4, 6, 12, 6),
        "dims": (96, 192, 384, 512),
        "num_heads": (1, 2, 6, 8),
        "layer_scale": (1.0, 1.0, 1e-6, 1e-6),
    },
    "ravlt_large": {
        "depths": (4, 7, 19, 8),
        "dims": (96, 192, 448, 640),
        "num_heads": (1, 2, 7, 10),
        "layer_scale": 1e-6,
    },
    "test_ravlt": {"depths": (1, 1, 2, 1), "dims": (16, 24, 32, 48), "num_heads": (1, 2, 2, 4), "proj_dim": 64},
}
RAVLTDense.variants = VARIANTS


def _cfg(size: int = 224) -> dict[str, Any]:
    return pretrained_cfg(
        size,
        first_conv="stem.0",
        license="none stated",
        paper_ids="arXiv:2411.07635",
        origin_url="https://github.com/qhfan/RALA",
    )


default_cfgs = generate_default_cfgs(
    {
        **{name: _cfg() for name in VARIANTS if name != "test_ravlt"},
        "test_ravlt": _cfg(96),
    }
)

CARD = Card(
    family="RAVLT",
    paper="2411.07635",
    code="https://github.com/qhfan/RALA",
    license="",
    test="models/test_ravlt.py",
)
CARDS = {
    "ravlt_tiny": CARD("14.9 M parameters, 2.4 G multiply-adds at 224²", "top-1 82.8 %"),
    "ravlt_small": CARD("25.6 M parameters, 4.6 G multiply-adds at 224²", "top-1 84.4 %"),
    "ravlt_base": CARD("48.2 M parameters, 9.9 G multiply-adds at 224²", "top-1 85.5 %"),
    "ravlt_large": CARD("95.2 M parameters, 16.0 G multiply-adds at 224²", "top-1 86.0 %"),
    "test_ravlt": CARD("Small enough for tests (< 0.5 M parameters)"),
}
ENTRIES = timm_entries(RAVLT, VARIANTS, CARDS, default_cfgs)
