"""BiFormer: a pyramid whose tokens attend only to the regions their own region was routed to.

Paper: BiFormer: Vision Transformer with Bi-Level Routing Attention, CVPR 2023, arXiv 2303.08810.

Official code: https://github.com/rayleizhu/BiFormer, ``models/biformer.py``, ``models/biformer_stl.py``,
``models/biformer_stl_nchw.py``, ``ops/bra_legacy.py``, ``ops/bra_nchw.py``, ``object_detection/models_mm``.

The same: weights (``vision_models.load_official``), outputs and gradients of the five published variants and of the
dense backbone, at sizes the regions divide and at padded ones, and every option of the official constructors that
changes a result.

Different, and why:
- Keys and values are never gathered: :func:`attn_core.block_attention` reads the routed regions through an index.
- Tokens stay one channels-last map; the official code permutes into regions and back in every block.
- ``auto_pad`` is on by default (equal numbers where the official code runs without it, any size elsewhere), and
  ``pad_mode="masked"`` hides the padding from means, routing and softmax, which the official code never does.
- ``n_win="auto"`` lets the number of regions grow with the image, as §3.3 of the paper wants; checkpoints are trained
  with a fixed one.
- Full attention with LePE on the values is ``topk=-2, lepe_source="value"``; the official nchw model calls it −1.
- Linear layers of the nchw model start as those of the others (the official 1×1 convolutions keep torch's default).
- Left out because they cannot run officially: ``representation_size``, ``pe``, fractional and convolutional pooling of
  keys, ``diff_routing`` without ``soft_routing``.

Numbers are checked in ``tests/models/test_biformer.py`` against a plain network with full scores.

Shapes: image (B, 3, Y, X) → logits (B, num_classes); maps (B, C_i, ⌈Y/s⌉, ⌈X/s⌉) with s = 4, 8, 16, 32.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import ClassifierHead, DropPath, LayerNorm2d
from timm.models import (
    generate_default_cfgs,
    register_notrace_function,
)
from torch import Tensor, nn

from attn_core import attention
from attn_core.catalog import Card
from attn_core.weights import KeyMap
from vision_models.backbone import Dense, Stage, StagedBackbone
from vision_models.layers.bilevel_routing import KeyPooling, PadMode, RoutedAttention
from vision_models.layers.token_maps import DepthwiseConv, Linear, init_linear, through_gelu
from vision_models.registration import pretrained_cfg, timm_entries

__all__ = ["BiFormer", "BiFormerDense"]

NORM_LAYERS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm2d, "layer": LayerNorm2d}


@register_notrace_function
def full_attention(qkv: Tensor, num_heads: int, scale: float) -> Tensor:
    """Softmax attention of every token to every token: (B, Y, X, 3·C) → (B, Y, X, C)."""
    batch, height, width, channels = qkv.shape
    shape = (batch, height * width, 3, num_heads, channels // (3 * num_heads))
    q, k, v = qkv.flatten(1, 2).view(shape).permute(2, 0, 3, 1, 4).unbind(0)
    out = attention(q, k, v, scale=scale)[0]
    return out.transpose(1, 2).reshape(batch, height, width, channels // 3)


class FullAttention(nn.Module):
    """Attention over the whole map with eight heads (topk −1, −2), LePE of the input, of the values, or none.

    Shapes: x (B, Y, X, dim) → (B, Y, X, dim).
    """

    def __init__(self, dim: int, lepe_source: Literal["input", "value"] | None, side_dwconv: int, **dd: Any) -> None:
        super().__init__()
        self.dim = dim
        self.num_heads = 8  # whatever head_dim says: so were the released checkpoints trained
        if dim % self.num_heads:
            raise ValueError(f"BiFormer: a stage with full attention needs dim % 8 == 0, got dim={dim}")
        self.lepe_on_value = lepe_source == "value"
        self.qkv = Linear(dim, 3 * dim, bias=False, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.lepe = DepthwiseConv(dim, side_dwconv, **dd) if lepe_source is not None and side_dwconv > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        out = full_attention(qkv, self.num_heads, (self.dim // self.num_heads) ** -0.5)
        if self.lepe is not None:
            out = out + self.lepe(qkv[..., 2 * self.dim :] if self.lepe_on_value else x)
        return self.proj(out)


class ConvolutionMixer(nn.Module):
    """The ablation that stands in for attention at topk 0: 1×1, depthwise 5×5, 1×1. (B, Y, X, C) → same."""

    def __init__(self, dim: int, **dd: Any) -> None:
        super().__init__()
        self.conv_in = Linear(dim, dim, **dd)
        self.conv_mix = DepthwiseConv(dim, 5, **dd)
        self.conv_out = Linear(dim, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.conv_mix(self.conv_in(x)))


class Mlp(nn.Module):
    """Linear, optional depthwise 3×3, GELU, linear. (B, Y, X, dim) → same."""

    def __init__(self, dim: int, hidden: int, dwconv: bool, **dd: Any) -> None:
        super().__init__()
        self.fc1 = Linear(dim, hidden, **dd)
        self.dwconv = DepthwiseConv(hidden, 3, **dd) if dwconv else None
        self.fc2 = Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        # GELU follows fc1 within the same kernel, unless a convolution stands between them
        x = through_gelu(self.fc1, x) if self.dwconv is None else F.gelu(self.dwconv(self.fc1(x)))
        return self.fc2(x)


class Block(nn.Module):
    """Positional depthwise convolution, attention, MLP, each with a residual. (B, Y, X, dim) → same."""

    def __init__(
        self,
        dim: int,
        attn: nn.Module,
        *,
        mlp_ratio: float,
        mlp_dwconv: bool,
        before_attn_dwconv: int,
        layer_scale_init_value: float | None,
        pre_norm: bool,
        drop_path: float,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.pre_norm = pre_norm
        self.pos_embed = DepthwiseConv(dim, before_attn_dwconv, **dd) if before_attn_dwconv > 0 else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), mlp_dwconv, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.gamma1 = self.gamma2 = None
        if layer_scale_init_value is not None and layer_scale_init_value > 0:
            self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale_init_value, **dd))
            self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale_init_value, **dd))

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = x + self.pos_embed(x)
        if self.pre_norm:
            x = x + self.drop_path(self._scaled(self.attn(self.norm1(x)), self.gamma1))
            return x + self.drop_path(self._scaled(self.mlp(self.norm2(x)), self.gamma2))
        else:
            x = self.norm1(x + self.drop_path(self._scaled(self.attn(x), self.gamma1)))
            return self.norm2(x + self.drop_path(self._scaled(self.mlp(x), self.gamma2)))

    def _scaled(self, x: Tensor, gamma: Tensor | None) -> Tensor:
        return x if gamma is None else gamma * x


def _conv_stem(in_chans: int, dim: int, norm: type[nn.Module], **dd: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
        norm(dim // 2, **dd),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        norm(dim, **dd),
    )


class BiFormer(StagedBackbone):
    """The classification network and, through timm's feature interfaces, a backbone for any resolution.

    Args:
        stem: ``"conv"`` overlapping 3×3 convolutions (T, S, B), ``"patch"`` patches as in Swin (STL).
        norm_layer: of stem, downsampling and output.
        head_dim: width of a query head in routed stages; full attention always has eight heads.
        qk_dims: query and key width per stage; that of the stage by default.
        n_win: regions per side, one number or one per stage, or ``"auto"``: 7 at 224², growing as pixels^⅓.
        topks: per stage: > 0 routed regions, 0 convolutions, −1 full attention, −2 full attention with LePE.
        lepe_source: what LePE of full attention convolves.
        pad_mode: ``"legacy"`` zero-pads the input of the projection (released checkpoints), ``"nchw"`` queries, keys
            and values after it (refactored official code); both let padding take part. ``"masked"`` hides it.
        auto_pad: False raises where padding would be needed.
        soft_routing: weigh keys and values of a region by its routing probability; ``diff_routing`` lets the gradient
            through the weight, ``param_routing`` adds a linear layer to the region means.
        kv_downsample_mode: pool keys and values of a region to kv_per_wins² (``ada_*``) or by kv_downsample_ratios.
        param_attention: ``"qkv"`` leaves out the output projection.

    Raises:
        ValueError: options that contradict each other or the widths.
    """

    undecayed = (".gamma1", ".gamma2")

    # Whole: each of its options is checked and used once; parts would relay them.
    def __init__(
        self,
        depths: Sequence[int] = (2, 2, 8, 2),
        dims: Sequence[int] = (64, 128, 256, 512),
        *,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        stem: Literal["conv", "patch"] = "conv",
        norm_layer: Literal["batch", "layer"] = "batch",
        mlp_ratios: float | Sequence[float] = 3.0,
        head_dim: int = 32,
        qk_dims: Sequence[int | None] = (None, None, None, None),
        qk_scale: float | None = None,
        n_win: int | Sequence[int] | Literal["auto"] = 7,
        topks: Sequence[int] = (1, 4, 16, -2),
        lepe_source: Literal["input", "value"] = "input",
        pad_mode: PadMode = "legacy",
        auto_pad: bool = True,
        side_dwconv: int = 5,
        before_attn_dwconv: int = 3,
        param_attention: Literal["qkvo", "qkv"] = "qkvo",
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        kv_downsample_mode: KeyPooling = "identity",
        kv_per_wins: Sequence[int] = (4, 4, 4, 4),
        kv_downsample_ratios: Sequence[int] = (4, 2, 1, 1),
        mlp_dwconv: bool = False,
        pre_norm: bool = True,
        layer_scale_init_value: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        for option, values in (
            ("depths", depths),
            ("dims", dims),
            ("qk_dims", qk_dims),
            ("topks", topks),
            ("kv_per_wins", kv_per_wins),
            ("kv_downsample_ratios", kv_downsample_ratios),
            ("n_win", (7,) * 4 if isinstance(n_win, (int, str)) else n_win),
            ("mlp_ratios", mlp_ratios if isinstance(mlp_ratios, Sequence) else (mlp_ratios,) * 4),
        ):
            if len(values) != 4:
                raise ValueError(f"BiFormer: {option} must have one entry for each of 4 stages, got {option}={values}")
        for option, value, allowed in (
            ("stem", stem, ("conv", "patch")),
            ("norm_layer", norm_layer, tuple(NORM_LAYERS)),
            ("pad_mode", pad_mode, ("legacy", "nchw", "masked")),
            ("lepe_source", lepe_source, ("input", "value")),
            ("param_attention", param_attention, ("qkvo", "qkv")),
            ("n_win", n_win if isinstance(n_win, str) else "auto", ("auto",)),
        ):
            if value not in allowed:
                raise ValueError(f"BiFormer: {option} must be one of {allowed}, got {option}={value!r}")
        for option, kernel in (("side_dwconv", side_dwconv), ("before_attn_dwconv", before_attn_dwconv)):
            if kernel < 0 or (kernel > 0 and kernel % 2 == 0):
                raise ValueError(f"BiFormer: {option} must be odd, or 0 for none, got {option}={kernel}")
        if min(topks) < -2:
            raise ValueError(f"BiFormer: topks must be positive, 0, -1 or -2, got topks={tuple(topks)}")

        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = dims[-1]
        self.feature_info = []
        norm = NORM_LAYERS[norm_layer]
        windows = (7,) * 4 if isinstance(n_win, str) else (n_win,) * 4 if isinstance(n_win, int) else tuple(n_win)
        ratios = tuple(mlp_ratios) if isinstance(mlp_ratios, Sequence) else (mlp_ratios,) * 4
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()

        self.min_side = 1 if stem == "conv" else 32
        if stem == "conv":
            self.stem = _conv_stem(in_chans, dims[0], norm, **dd)
        else:
            self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, stride=4, **dd), norm(dims[0], **dd))
        stages: list[nn.Module] = []
        for i, (dim, topk) in enumerate(zip(dims, topks, strict=True)):
            if i == 0:
                downsample: nn.Module = nn.Identity()
            elif stem == "conv":
                downsample = nn.Sequential(nn.Conv2d(dims[i - 1], dim, 3, stride=2, padding=1, **dd), norm(dim, **dd))
            else:
                downsample = nn.Sequential(norm(dims[i - 1], **dd), nn.Conv2d(dims[i - 1], dim, 2, stride=2, **dd))
            if topk > 0:
                attention_layer = partial(
                    RoutedAttention,
                    topk=topk,
                    n_win=windows[i],
                    auto_side=56 >> i if n_win == "auto" else 0,
                    qk_dim=qk_dims[i],
                    head_dim=head_dim,
                    qk_scale=qk_scale,
                    pad_mode=pad_mode,
                    auto_pad=auto_pad,
                    side_dwconv=side_dwconv,
                    param_attention=param_attention,
                    param_routing=param_routing,
                    diff_routing=diff_routing,
                    soft_routing=soft_routing,
                    kv_downsample_mode=kv_downsample_mode,
                    kv_per_win=kv_per_wins[i],
                    kv_downsample_ratio=kv_downsample_ratios[i],
                )
            elif topk == 0:
                attention_layer = ConvolutionMixer
            else:
                source = lepe_source if topk == -2 else None
                attention_layer = partial(FullAttention, lepe_source=source, side_dwconv=side_dwconv)
            blocks = [
                Block(
                    dim,
                    attention_layer(dim, **dd),
                    mlp_ratio=ratios[i],
                    mlp_dwconv=mlp_dwconv,
                    before_attn_dwconv=before_attn_dwconv,
                    layer_scale_init_value=layer_scale_init_value,
                    pre_norm=pre_norm,
                    drop_path=rate,
                    **dd,
                )
                for rate in rates[sum(depths[:i]) : sum(depths[: i + 1])]
            ]
            stages.append(Stage(downsample, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": 4 << i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm: nn.Module = norm(dims[-1], **dd)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.apply(init_linear)

    @property
    def fixed_size(self) -> str:
        """Why an exported graph serves one image size alone; empty where it serves all."""
        routed = any(isinstance(module, RoutedAttention) for module in self.modules())
        return "the tokens of a region are counted by the size of the map" if routed else ""


class BiFormerDense(Dense, BiFormer):  # pyright: ignore[reportIncompatibleMethodOverride]
    """Backbone for detection and segmentation: four maps, each with a LayerNorm of its own on the way out.

    Without classifier and output norm, as the official ``BiFormer_mm``.

    Args:
        variant: name of the classification variant to start from; ``options`` override its constructor arguments
            (the official recipes: ``n_win=16`` for COCO, ``n_win=8`` for ADE20K).
        norm_eval: keep BatchNorm in evaluation mode while training (detection's small batches).
        freeze_norm: give BatchNorm's weights no gradient.

    Shapes: image (B, 3, Y, X) → tuple of (B, C_i, ⌈Y/s⌉, ⌈X/s⌉), s = 4, 8, 16, 32.
    Raises: ValueError for an unknown variant.
    """

    out_eps = 1e-6

    def __init__(
        self, variant: str = "biformer_small", *, norm_eval: bool = True, freeze_norm: bool = False, **options: Any
    ) -> None:
        super().__init__(variant, **options)
        self.norm_eval = norm_eval
        for module in self.modules():
            if freeze_norm and isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> "BiFormerDense":
        """As ``nn.Module.train``, except that with ``norm_eval`` batch norms keep their stored statistics."""
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


# The three official classes name the same things differently.
_KEY_MAP_COMMON = (
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
    (r"^head\.fc\.", "head."),
    (r"^out_norms\.", "extra_norms."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.dwconv\.", ".mlp.1.dwconv."),
    (r"\.attn\.conv_in\.", ".attn.1."),
    (r"\.attn\.conv_mix\.", ".attn.2."),
    (r"\.attn\.conv_out\.", ".attn.3."),
    (r"\.attn\.router\.", ".attn.router.emb."),
)
_KEY_MAP_LEGACY = ((r"\.attn\.qkv_linear\.", ".attn.qkv.qkv."), (r"\.attn\.output_linear\.", ".attn.wo."))
KEY_MAP: KeyMap = {
    "biformer": (*_KEY_MAP_COMMON, *_KEY_MAP_LEGACY, (r"\.blocks\.", "."), (r"\.mlp\.fc2\.", ".mlp.3.")),
    "biformer_stl": (*_KEY_MAP_COMMON, *_KEY_MAP_LEGACY, (r"\.mlp\.fc2\.", ".mlp.2.")),
    "biformer_stl_nchw": (*_KEY_MAP_COMMON, (r"\.mlp\.fc2\.", ".mlp.2.")),
}


BiFormer.key_map = KEY_MAP

VARIANTS: dict[str, dict[str, Any]] = {
    "biformer_tiny": {"depths": (2, 2, 8, 2), "dims": (64, 128, 256, 512)},
    "biformer_small": {"depths": (4, 4, 18, 4), "dims": (64, 128, 256, 512)},
    "biformer_base": {"depths": (4, 4, 18, 4), "dims": (96, 192, 384, 768)},
    "biformer_stl": {
        "depths": (2, 2, 6, 2),
        "dims": (96, 192, 384, 768),
        "mlp_ratios": 4.0,
        "stem": "patch",
        "before_attn_dwconv": 0,
    },
    "test_biformer": {"depths": (1, 1, 2, 1), "dims": (16, 32, 48, 64), "head_dim": 16, "topks": (1, 4, 9, -2)},
}
VARIANTS["biformer_stl_nchw"] = {**VARIANTS["biformer_stl"], "pad_mode": "nchw", "lepe_source": "value"}
BiFormerDense.variants = VARIANTS


def _cfg(size: int = 224) -> dict[str, Any]:
    return pretrained_cfg(
        size,
        first_conv="stem.0",
        license="mit",
        paper_ids="arXiv:2303.08810",
        origin_url="https://github.com/rayleizhu/BiFormer",
    )


default_cfgs = generate_default_cfgs(
    {
        **{name: _cfg() for name in VARIANTS if name != "test_biformer"},
        "test_biformer": _cfg(96),
    }
)

CARD = Card(
    family="BiFormer",
    paper="2303.08810",
    code="https://github.com/rayleizhu/BiFormer",
    license="MIT",
    test="models/test_biformer.py",
)
CARDS = {
    "biformer_tiny": CARD("13.1 M parameters, 2.2 G multiply-adds at 224²", "top-1 81.4 %"),
    "biformer_small": CARD("25.5 M parameters, 4.5 G multiply-adds at 224²", "top-1 83.8 %"),
    "biformer_base": CARD("56.8 M parameters, 9.8 G multiply-adds at 224²", "top-1 84.3 %"),
    "biformer_stl": CARD("Swin-T layout: 28.4 M parameters, 4.6 G multiply-adds at 224²", "top-1 82.7 %"),
    "biformer_stl_nchw": CARD("Swin-T layout of the refactored official code: 28.4 M parameters", "top-1 82.7 %"),
    "test_biformer": CARD("Small enough for tests (< 0.5 M parameters)"),
}
ENTRIES = timm_entries(BiFormer, VARIANTS, CARDS, default_cfgs)
