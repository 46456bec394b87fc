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

Numbers are checked in ``tests/test_biformer.py`` against a formulation with gathered keys and full scores.

Shapes: image (B, 3, Y, X) → logits (B, num_classes); maps (B, C_i, ⌈Y/s⌉, ⌈X/s⌉) with s = 4, 8, 16, 32.
"""

import re
from collections.abc import Sequence
from typing import Any, Literal, Optional

import torch
import torch.nn.functional as F
from attn_core import attention, block_attention, topk_route, window_index
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import ClassifierHead, DropPath, LayerNorm2d, get_device_dtype, to_ntuple, trunc_normal_
from timm.models import (
    build_model_with_cfg,
    checkpoint_seq,
    generate_default_cfgs,
    register_model,
    register_notrace_function,
)
from timm.models._features import feature_take_indices  # timm exports it nowhere else
from torch import Tensor, nn

__all__ = ["BiFormer", "BiFormerDense"]

PadMode = Literal["legacy", "nchw", "masked"]
NORM_LAYERS: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm2d, "layer": LayerNorm2d}

# Annotations of what TorchScript compiles are plain Tensors: it cannot read jaxtyping's. Shapes stand in docstrings.
# The functions below hold Python decisions about sizes; register_notrace_function keeps FX from tracing into them.


@register_notrace_function
def regions_per_side(height: int, width: int, n_win: int, auto_side: int) -> int:
    """``n_win``, or with ``auto_side`` > 0 a number that is ``n_win`` on a map of that side and grows as (Y·X)^⅓."""
    if auto_side == 0:
        return n_win
    return max(1, int(round(n_win * (height * width / (auto_side * auto_side)) ** (1.0 / 3.0))))


@register_notrace_function
def region_size(height: int, width: int, n_win: int, floor: bool) -> tuple[int, int]:
    """Tokens of one region (rows, columns); rounded up, or down for ``pad_mode="nchw"``, which then adds regions."""
    if floor:
        return max(1, height // n_win), max(1, width // n_win)
    return -(-height // n_win), -(-width // n_win)


@register_notrace_function
def pad_to_multiple(x: Tensor, rows: int, columns: int, allowed: bool) -> Tensor:
    """Zero rows below and columns to the right of (B, Y, X, C), up to multiples of ``rows`` and ``columns``."""
    bottom, right = -x.shape[1] % rows, -x.shape[2] % columns
    if bottom > 0 or right > 0:
        if not allowed:
            raise ValueError(
                f"biformer: a map of {x.shape[1]}×{x.shape[2]} tokens does not split into {rows}×{columns} regions; "
                "resize the image or pass auto_pad=True"
            )
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    return x


@register_notrace_function
def region_means(x: Tensor, region: tuple[int, int]) -> Tensor:
    """Mean token of each region, cells outside the map not counted: (B, Y, X, C) → (B, R, C)."""
    means = F.avg_pool2d(x.permute(0, 3, 1, 2), region, ceil_mode=True, count_include_pad=False)
    return means.flatten(2).transpose(1, 2)


@register_notrace_function
def route(q_regions: Tensor, k_regions: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """The regions each region reads and their softmax weights, (B, 1, R, K) both; K is at most the number of regions.

    Only ``n_win="auto"``, ``"nchw"`` and ``"masked"`` can meet fewer regions than ``topk``, on very small maps.
    """
    topk = min(topk, k_regions.shape[1])
    if torch.jit.is_scripting():
        affinity, table = torch.topk((q_regions * scale) @ k_regions.transpose(-2, -1), topk, dim=-1)
        return table.unsqueeze(1), affinity.softmax(-1).unsqueeze(1)
    else:
        return topk_route(q_regions, k_regions, topk, scale=scale)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, L, H·D) → (B, H, L, D), a view."""
    return x.view(x.shape[0], x.shape[1], num_heads, x.shape[2] // num_heads).transpose(1, 2)


@register_notrace_function
def routed_attention(
    qkv: Tensor,
    pooled_kv: Optional[Tensor],  # noqa: UP045  TorchScript does not know `Tensor | None`
    table: Tensor,
    weight: Optional[Tensor],  # noqa: UP045
    region: tuple[int, int],
    num_heads: int,
    qk_dim: int,
    scale: float,
) -> Tensor:
    """Softmax attention of every token to the tokens of the regions in its region's row of ``table``.

    Shapes: qkv (B, Y, X, 2·qk_dim + C); pooled_kv (B, R, J, qk_dim + C) takes the place of the regions' own keys and
    values; table and weight (B, 1, R, K) → (B, Y, X, C).
    """
    batch, height, width, channels = qkv.shape
    tokens = qkv.flatten(1, 2)
    q = split_heads(tokens[..., :qk_dim], num_heads)
    kv = tokens[..., qk_dim:] if pooled_kv is None else pooled_kv.flatten(1, 2)
    k = split_heads(kv[..., :qk_dim], num_heads)
    v = split_heads(kv[..., qk_dim:], num_heads)
    if torch.jit.is_scripting():
        q_index = scripted_window_index(height, width, region, qkv.device)
    else:
        q_index = window_index(height, width, region, device=qkv.device)
    kv_index = q_index
    if pooled_kv is not None:
        regions, keys = pooled_kv.shape[1], pooled_kv.shape[2]
        kv_index = torch.arange(regions * keys, device=qkv.device).view(1, 1, regions, keys)
    if torch.jit.is_scripting():
        out = scripted_block_attention(q, k, v, q_index, kv_index, table, weight, scale)
    else:
        out = block_attention(q, k, v, q_index, kv_index, table, kv_weight=weight, scale=scale)[0]
    return out.transpose(1, 2).reshape(batch, height, width, channels - 2 * qk_dim)


def scripted_window_index(height: int, width: int, region: tuple[int, int], device: torch.device) -> Tensor:
    """``attn_core.window_index`` in the subset of Python that TorchScript compiles."""
    index = torch.arange(height * width, device=device).view(height, width)
    index = F.pad(index, (0, -width % region[1], 0, -height % region[0]), value=-1)
    index = index.view(-1, region[0], index.shape[1] // region[1], region[1]).transpose(1, 2)
    return index.reshape(1, 1, -1, region[0] * region[1])


def scripted_block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    kv_index: Tensor,
    table: Tensor,
    weight: Optional[Tensor],  # noqa: UP045
    scale: float,
) -> Tensor:
    """``attn_core.block_attention`` for TorchScript, which cannot call it: gathered keys, scores in full."""
    batch, heads, length, head_dim = q.shape
    regions, slots = table.shape[2], table.shape[3]
    keys = kv_index[0, 0][table.flatten()].view(batch, regions, -1)  # (B, R, K·J) token numbers, −1 outside the map
    gather = keys.clamp(min=0).view(batch, 1, -1, 1)
    k = k.gather(2, gather.expand(-1, heads, -1, head_dim)).view(batch, heads, regions, -1, head_dim)
    v = v.gather(2, gather.expand(-1, heads, -1, v.shape[3])).view(batch, heads, regions, -1, v.shape[3])
    if weight is not None:
        slot_weight = weight.repeat_interleave(keys.shape[2] // slots, dim=3).unsqueeze(4)
        k, v = slot_weight * k, slot_weight * v
    inside = q_index[0, 0].flatten()
    q = q[:, :, inside.clamp(min=0)].view(batch, heads, regions, -1, head_dim)
    scores = (q * scale) @ k.transpose(3, 4)
    scores = scores.masked_fill((keys < 0)[:, None, :, None], float("-inf"))
    out = (scores.softmax(-1) @ v).flatten(2, 3)
    visible = torch.nonzero(inside >= 0).flatten()
    return torch.zeros(batch, heads, length, v.shape[4], dtype=v.dtype, device=v.device).index_copy(
        2, inside[visible], out[:, :, visible]
    )


@register_notrace_function
def full_attention(qkv: Tensor, num_heads: int, scale: float) -> Tensor:
    """Softmax attention of every token to every token: (B, Y, X, 3·C) → (B, Y, X, C)."""
    batch, height, width, channels = qkv.shape
    q, k, v = qkv.flatten(1, 2).view(batch, height * width, 3, num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    if torch.jit.is_scripting():
        out = ((q * scale) @ k.transpose(-2, -1)).softmax(-1) @ v
    else:
        out = attention(q, k, v, scale=scale)[0]
    return out.transpose(1, 2).reshape(batch, height, width, channels // 3)


def depthwise(dim: int, kernel: int, **dd: Any) -> nn.Conv2d:
    return nn.Conv2d(dim, dim, kernel, padding=kernel // 2, groups=dim, **dd)


def on_map(conv: nn.Module, x: Tensor) -> Tensor:
    """Run a convolution on (B, Y, X, C); both permutes are views of channels-last memory."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class RoutedAttention(nn.Module):
    """Bi-level routing attention (eq. 2–8): choose ``topk`` regions per region, attend to their tokens, add LePE.

    The routing sees region means of queries and keys; unless ``diff_routing``, no gradient flows through it. Logits
    are scaled by the full query width, qk_dim^−½, not by the head's.

    Shapes: x (B, Y, X, dim) → (B, Y, X, dim).
    Raises: ValueError for widths that heads do not divide and for options that exclude each other.
    """

    def __init__(
        self,
        dim: int,
        *,
        topk: int,
        n_win: int,
        auto_side: int = 0,
        qk_dim: int | None = None,
        head_dim: int = 32,
        qk_scale: float | None = None,
        pad_mode: PadMode = "legacy",
        auto_pad: bool = True,
        side_dwconv: int = 5,
        param_attention: Literal["qkvo", "qkv"] = "qkvo",
        param_routing: bool = False,
        diff_routing: bool = False,
        soft_routing: bool = False,
        kv_downsample_mode: Literal["identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool"] = "identity",
        kv_per_win: int = 4,
        kv_downsample_ratio: int = 4,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.qk_dim = qk_dim or dim
        self.num_heads = self.qk_dim // head_dim
        if self.num_heads == 0 or self.qk_dim % self.num_heads or dim % self.num_heads:
            raise ValueError(f"BiFormer: heads of width {head_dim} must divide qk_dim={self.qk_dim} and dim={dim}")
        if auto_side == 0 and pad_mode == "legacy" and topk > n_win**2:
            raise ValueError(f"BiFormer: topk must not exceed the n_win² = {n_win**2} regions, got topk={topk}")
        if param_routing and not diff_routing:
            raise ValueError("BiFormer: param_routing=True needs diff_routing=True, or its weights get no gradient")
        if diff_routing and not soft_routing:
            raise ValueError("BiFormer: diff_routing=True needs soft_routing=True, the only path of its gradient")
        if kv_downsample_mode != "identity" and pad_mode != "legacy":
            raise ValueError(
                f"BiFormer: kv_downsample_mode={kv_downsample_mode!r} needs pad_mode='legacy', got pad_mode={pad_mode!r}"
            )
        self.topk = topk
        self.n_win = n_win
        self.auto_side = auto_side
        self.scale = float(qk_scale or self.qk_dim**-0.5)
        self.pad_mode = pad_mode
        self.auto_pad = auto_pad
        self.diff_routing = diff_routing
        self.soft_routing = soft_routing
        self.qkv_linear = nn.Linear(dim, 2 * self.qk_dim + dim, **dd)
        self.output_linear = nn.Linear(dim, dim, **dd) if param_attention == "qkvo" else nn.Identity()
        self.lepe = depthwise(dim, side_dwconv, **dd) if side_dwconv > 0 else None
        self.router = nn.Linear(self.qk_dim, self.qk_dim, **dd) if param_routing else None
        self.kv_pool = _key_pooling(kv_downsample_mode, kv_per_win, kv_downsample_ratio)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[1], x.shape[2]
        n_win = regions_per_side(height, width, self.n_win, self.auto_side)
        if self.pad_mode == "legacy":
            x = pad_to_multiple(
                x, n_win, n_win, self.auto_pad
            )  # padding before the projection: its tokens equal the bias
        qkv = self.qkv_linear(x)
        region = region_size(qkv.shape[1], qkv.shape[2], n_win, self.pad_mode == "nchw")
        table, weight = self._route(qkv, region)

        pooled_kv: Optional[Tensor] = None  # noqa: UP045
        if self.kv_pool is not None:
            pooled_kv = self._pool_regions(qkv[..., self.qk_dim :], region)
        frame = qkv
        if self.pad_mode == "nchw":
            frame = pad_to_multiple(qkv, region[0], region[1], self.auto_pad)  # zero keys that take part in the softmax
        out = routed_attention(
            frame,
            pooled_kv,
            table,
            weight if self.soft_routing else None,
            region,
            self.num_heads,
            self.qk_dim,
            self.scale,
        )
        out = out[:, :height, :width]
        if self.lepe is not None:
            out = out + on_map(self.lepe, qkv[..., 2 * self.qk_dim :])[:, :height, :width]
        return self.output_linear(out)

    def _route(self, qkv: Tensor, region: tuple[int, int]) -> tuple[Tensor, Tensor]:
        q_and_k = qkv[..., : 2 * self.qk_dim]
        means = region_means(q_and_k if self.diff_routing else q_and_k.detach(), region)
        q_regions, k_regions = means[..., : self.qk_dim], means[..., self.qk_dim :]
        if self.router is not None:
            q_regions, k_regions = self.router(q_regions), self.router(k_regions)
        return route(q_regions, k_regions, self.topk, self.scale)

    def _pool_regions(self, kv: Tensor, region: tuple[int, int]) -> Tensor:
        """Pool keys and values inside each region: (B, Y, X, C) → (B, R, J, C)."""
        batch, height, width, channels = kv.shape
        rows, columns = height // region[0], width // region[1]
        kv = kv.view(batch, rows, region[0], columns, region[1], channels).permute(0, 1, 3, 5, 2, 4)
        assert self.kv_pool is not None  # for TorchScript, which forgets the caller's check
        pooled = self.kv_pool(kv.reshape(batch * rows * columns, channels, region[0], region[1]))
        return pooled.flatten(2).transpose(1, 2).reshape(batch, rows * columns, -1, channels)


def _key_pooling(mode: str, per_win: int, ratio: int) -> nn.Module | None:
    if mode == "identity" or (mode in ("avgpool", "maxpool") and ratio == 1):
        return None
    pools = {
        "ada_avgpool": (nn.AdaptiveAvgPool2d, per_win),
        "ada_maxpool": (nn.AdaptiveMaxPool2d, per_win),
        "avgpool": (nn.AvgPool2d, ratio),
        "maxpool": (nn.MaxPool2d, ratio),
    }
    if mode not in pools:
        raise ValueError(
            f"BiFormer: kv_downsample_mode must be 'identity' or one of {sorted(pools)}, got kv_downsample_mode={mode!r}"
        )
    kind, size = pools[mode]
    if size < 1:
        raise ValueError(f"BiFormer: kv_downsample_mode={mode!r} needs a positive size for each stage, got {size}")
    return kind(size)


class FullAttention(nn.Module):
    """Attention over the whole map with eight heads (topk −1, −2), LePE of the input, of the values, or none.

    Shapes: x (B, Y, X, dim) → (B, Y, X, dim).
    """

    def __init__(
        self,
        dim: int,
        *,
        lepe_source: Literal["input", "value"] | None,
        side_dwconv: int = 5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dim = dim
        self.num_heads = 8  # whatever head_dim says: so were the released checkpoints trained
        if dim % self.num_heads:
            raise ValueError(f"BiFormer: a stage with full attention needs dim % 8 == 0, got dim={dim}")
        self.lepe_on_value = lepe_source == "value"
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, **dd)
        self.proj = nn.Linear(dim, dim, **dd)
        self.lepe = depthwise(dim, side_dwconv, **dd) if lepe_source is not None and side_dwconv > 0 else None

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        out = full_attention(qkv, self.num_heads, (self.dim // self.num_heads) ** -0.5)
        if self.lepe is not None:
            out = out + on_map(self.lepe, qkv[..., 2 * self.dim :] if self.lepe_on_value else x)
        return self.proj(out)


class ConvolutionMixer(nn.Module):
    """The ablation that stands in for attention at topk 0: 1×1, depthwise 5×5, 1×1. (B, Y, X, C) → same."""

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv_in = nn.Conv2d(dim, dim, 1, **dd)
        self.conv_mix = depthwise(dim, 5, **dd)
        self.conv_out = nn.Conv2d(dim, dim, 1, **dd)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.conv_mix(self.conv_in(x.permute(0, 3, 1, 2)))).permute(0, 2, 3, 1)


class Mlp(nn.Module):
    """Linear, optional depthwise 3×3, GELU, linear. (B, Y, X, dim) → same."""

    def __init__(
        self,
        dim: int,
        hidden: int,
        *,
        dwconv: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.fc1 = nn.Linear(dim, hidden, **dd)
        self.dwconv = depthwise(hidden, 3, **dd) if dwconv else None
        self.fc2 = nn.Linear(hidden, dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.dwconv is not None:
            x = on_map(self.dwconv, x)
        return self.fc2(F.gelu(x))


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
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.pre_norm = pre_norm
        self.pos_embed = depthwise(dim, before_attn_dwconv, **dd) if before_attn_dwconv > 0 else None
        self.norm1 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6, **dd)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), dwconv=mlp_dwconv, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        scaled = layer_scale_init_value is not None and layer_scale_init_value > 0
        self.gamma1 = nn.Parameter(torch.full((dim,), layer_scale_init_value, **dd)) if scaled else None
        self.gamma2 = nn.Parameter(torch.full((dim,), layer_scale_init_value, **dd)) if scaled else None

    def forward(self, x: Tensor) -> Tensor:
        if self.pos_embed is not None:
            x = x + on_map(self.pos_embed, x)
        if self.pre_norm:
            x = x + self.drop_path(self._scaled(self.attn(self.norm1(x)), self.gamma1))
            return x + self.drop_path(self._scaled(self.mlp(self.norm2(x)), self.gamma2))
        else:
            x = self.norm1(x + self.drop_path(self._scaled(self.attn(x), self.gamma1)))
            return self.norm2(x + self.drop_path(self._scaled(self.mlp(x), self.gamma2)))

    def _scaled(self, x: Tensor, gamma: Optional[Tensor]) -> Tensor:  # noqa: UP045
        return x if gamma is None else gamma * x


class Stage(nn.Module):
    """Downsampling, then blocks on the channels-last map. (B, C, Y, X) → (B, dim, Y', X')."""

    def __init__(self, downsample: nn.Module, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.downsample = downsample
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x).permute(0, 2, 3, 1).contiguous()
        if self.grad_checkpointing and not torch.jit.is_scripting():
            x = checkpoint_seq(self.blocks, x)
        else:
            x = self.blocks(x)
        return x.permute(0, 3, 1, 2)


def _conv_stem(in_chans: int, dim: int, norm: type[nn.Module], **dd: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_chans, dim // 2, 3, stride=2, padding=1, **dd),
        norm(dim // 2, **dd),
        nn.GELU(),
        nn.Conv2d(dim // 2, dim, 3, stride=2, padding=1, **dd),
        norm(dim, **dd),
    )


class BiFormer(nn.Module):
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
        kv_downsample_mode: Literal["identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool"] = "identity",
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
        per_stage = {"depths": depths, "dims": dims, "qk_dims": qk_dims, "topks": topks, "kv_per_wins": kv_per_wins}
        per_stage["kv_downsample_ratios"] = kv_downsample_ratios
        for option, values in per_stage.items():
            if len(values) != 4:
                raise ValueError(f"BiFormer: {option} must have one entry for each of 4 stages, got {option}={values}")
        for option, value, allowed in (
            ("stem", stem, ("conv", "patch")),
            ("norm_layer", norm_layer, tuple(NORM_LAYERS)),
            ("pad_mode", pad_mode, ("legacy", "nchw", "masked")),
            ("lepe_source", lepe_source, ("input", "value")),
            ("param_attention", param_attention, ("qkvo", "qkv")),
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
        self.feature_info: list[dict[str, Any]] = []
        norm = NORM_LAYERS[norm_layer]
        windows = to_ntuple(4)(7 if n_win == "auto" else n_win)
        ratios = to_ntuple(4)(mlp_ratios)
        rates = torch.linspace(0, drop_path_rate, sum(depths), device="cpu").tolist()

        if stem == "conv":
            self.stem = _conv_stem(in_chans, dims[0], norm, **dd)
        else:
            self.stem = nn.Sequential(nn.Conv2d(in_chans, dims[0], 4, stride=4, **dd), norm(dims[0], **dd))
        stages: list[nn.Module] = []
        for i, (depth, dim, topk) in enumerate(zip(depths, dims, topks, strict=True)):
            if i == 0:
                downsample: nn.Module = nn.Identity()
            elif stem == "conv":
                downsample = nn.Sequential(nn.Conv2d(dims[i - 1], dim, 3, stride=2, padding=1, **dd), norm(dim, **dd))
            else:
                downsample = nn.Sequential(norm(dims[i - 1], **dd), nn.Conv2d(dims[i - 1], dim, 2, stride=2, **dd))
            blocks = []
            for _ in range(depth):
                attn: nn.Module
                if topk > 0:
                    attn = RoutedAttention(
                        dim,
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
                        **dd,
                    )
                elif topk == 0:
                    attn = ConvolutionMixer(dim, **dd)
                else:
                    source = lepe_source if topk == -2 else None
                    attn = FullAttention(dim, lepe_source=source, side_dwconv=side_dwconv, **dd)
                blocks.append(
                    Block(
                        dim,
                        attn,
                        mlp_ratio=ratios[i],
                        mlp_dwconv=mlp_dwconv,
                        before_attn_dwconv=before_attn_dwconv,
                        layer_scale_init_value=layer_scale_init_value,
                        pre_norm=pre_norm,
                        drop_path=rates[len(blocks) + sum(depths[:i])],
                        **dd,
                    )
                )
            stages.append(Stage(downsample, blocks))
            self.feature_info.append({"num_chs": dim, "reduction": 4 << i, "module": f"stages.{i}"})
        self.stages = nn.Sequential(*stages)
        self.norm: nn.Module = norm(dims[-1], **dd)
        self.head = ClassifierHead(dims[-1], num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd)
        self.apply(_init_weights)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith((".gamma1", ".gamma2"))}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        fine = [(r"^stages\.(\d+)\.downsample", (0,)), (r"^stages\.(\d+)\.blocks\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else fine}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        for stage in self.stages:
            stage.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None, reset_other: bool = False) -> None:
        """A new classifier on the model's device; 0 classes gives pooled features, with ``global_pool=""`` the map."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool, **get_device_dtype(self))

    def forward_features(self, x: Tensor) -> Tensor:
        """The normed map (B, num_features, Y/32, X/32)."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x, pre_logits=pre_logits) if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    @torch.jit.ignore
    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Stage outputs, and the final map unless ``intermediates_only``.

        Args:
            indices: the last n stages if int, all if None.
            norm: apply the output norm to the last stage's map, the only one it fits.
            stop_early: leave out the stages behind the last one asked for; the final map is then that stage's.
            output_fmt: ``"NCHW"`` or ``"NHWC"``.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise ValueError(
                f"forward_intermediates: output_fmt must be 'NCHW' or 'NHWC', got output_fmt={output_fmt!r}"
            )
        take, last = feature_take_indices(len(self.stages), indices)
        x = self.stem(x)
        intermediates = []
        stages = self.stages[: last + 1] if stop_early else self.stages
        for i, stage in enumerate(stages):
            x = stage(x)
            if i in take:
                tap = self.norm(x) if norm and i == len(self.stages) - 1 else x
                intermediates.append(tap if output_fmt == "NCHW" else tap.permute(0, 2, 3, 1))
        if intermediates_only:
            return intermediates
        return (self.norm(x) if len(stages) == len(self.stages) else x), intermediates

    @torch.jit.ignore
    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last one asked for; returns the absolute indices."""
        take, last = feature_take_indices(len(self.stages), indices)
        shortened = last < len(self.stages) - 1
        self.stages = self.stages[: last + 1]
        if prune_norm or shortened:
            self.norm = nn.Identity()
        if shortened:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
        if prune_head or shortened:
            self.reset_classifier(0, "")
        return take


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class BiFormerDense(BiFormer):
    """Backbone for detection and segmentation: four maps, each with a LayerNorm of its own on the way out.

    The un-normed map feeds the next stage. Without classifier and output norm, as the official ``BiFormer_mm``.

    Args:
        variant: name of the classification variant to start from; ``options`` override its constructor arguments
            (the official recipes: ``n_win=16`` for COCO, ``n_win=8`` for ADE20K).
        norm_eval: keep BatchNorm in evaluation mode while training (detection's small batches).
        freeze_norm: give BatchNorm's weights no gradient.

    Shapes: image (B, 3, Y, X) → tuple of (B, C_i, ⌈Y/s⌉, ⌈X/s⌉), s = 4, 8, 16, 32.
    """

    def __init__(
        self, variant: str = "biformer_small", *, norm_eval: bool = True, freeze_norm: bool = False, **options: Any
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"BiFormerDense: variant must be one of {sorted(VARIANTS)}, got variant={variant!r}")
        super().__init__(**{**VARIANTS[variant], **options, "num_classes": 0, "global_pool": ""})
        dd = get_device_dtype(self)
        self.norm = nn.Identity()
        self.extra_norms = nn.ModuleList(LayerNorm2d(info["num_chs"], **dd) for info in self.feature_info)
        self.norm_eval = norm_eval
        for module in self.modules():
            if freeze_norm and isinstance(module, nn.BatchNorm2d):
                module.requires_grad_(False)
        self.train(self.training)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x = self.stem(x)
        maps: list[Tensor] = []
        for stage, norm in zip(self.stages, self.extra_norms, strict=True):
            x = stage(x)
            maps.append(norm(x))
        return tuple(maps)

    def train(self, mode: bool = True) -> "BiFormerDense":
        super().train(mode)
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        return self


# Our parameter name → the official one, in order. The three official classes name the same things differently.
_KEY_MAP_COMMON = (
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
    (r"^head\.fc\.", "head."),
    (r"\.mlp\.fc1\.", ".mlp.0."),
    (r"\.mlp\.dwconv\.", ".mlp.1.dwconv."),
    (r"\.attn\.conv_in\.", ".attn.1."),
    (r"\.attn\.conv_mix\.", ".attn.2."),
    (r"\.attn\.conv_out\.", ".attn.3."),
    (r"\.attn\.router\.", ".attn.router.emb."),
)
_KEY_MAP_LEGACY = ((r"\.attn\.qkv_linear\.", ".attn.qkv.qkv."), (r"\.attn\.output_linear\.", ".attn.wo."))
KEY_MAP: dict[str, tuple[tuple[str, str], ...]] = {
    "biformer": (*_KEY_MAP_COMMON, *_KEY_MAP_LEGACY, (r"\.blocks\.", "."), (r"\.mlp\.fc2\.", ".mlp.3.")),
    "biformer_stl": (*_KEY_MAP_COMMON, *_KEY_MAP_LEGACY, (r"\.mlp\.fc2\.", ".mlp.2.")),
    "biformer_stl_nchw": (*_KEY_MAP_COMMON, (r"\.mlp\.fc2\.", ".mlp.2.")),
}


def official_names(model: BiFormer, layout: str) -> dict[str, str]:
    """Official parameter name → ours, for each entry of ``model.state_dict()``; ``layout`` is a key of KEY_MAP."""
    names = {}
    for ours in model.state_dict():
        official = ours
        for pattern, replacement in KEY_MAP[layout]:
            official = re.sub(pattern, replacement, official)
        names[official] = ours
    return names


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


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "stem.0",
        "classifier": "head.fc",
        "license": "mit",
        "paper_ids": "arXiv:2303.08810",
        "origin_url": "https://github.com/rayleizhu/BiFormer",
        **kwargs,
    }


default_cfgs = generate_default_cfgs(
    {
        **{name: _cfg() for name in VARIANTS if name != "test_biformer"},
        "test_biformer": _cfg(input_size=(3, 96, 96), pool_size=(3, 3)),
    }
)


def _create(variant: str, pretrained: bool, **kwargs: Any) -> BiFormer:
    return build_model_with_cfg(
        BiFormer,
        variant,
        pretrained,
        feature_cfg={"flatten_sequential": True, "out_indices": (0, 1, 2, 3)},
        **{**VARIANTS[variant], **kwargs},
    )


@register_model
def biformer_tiny(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """13.1 M parameters, 2.2 G multiply-adds at 224², published top-1 81.4 %."""
    return _create("biformer_tiny", pretrained, **kwargs)


@register_model
def biformer_small(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """25.5 M parameters, 4.5 G multiply-adds at 224², published top-1 83.8 %."""
    return _create("biformer_small", pretrained, **kwargs)


@register_model
def biformer_base(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """56.8 M parameters, 9.8 G multiply-adds at 224², published top-1 84.3 %."""
    return _create("biformer_base", pretrained, **kwargs)


@register_model
def biformer_stl(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """Swin-T layout: 28.4 M parameters, 4.6 G multiply-adds at 224², published top-1 82.7 %."""
    return _create("biformer_stl", pretrained, **kwargs)


@register_model
def biformer_stl_nchw(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """Swin-T layout of the refactored official code: same size and published accuracy as ``biformer_stl``."""
    return _create("biformer_stl_nchw", pretrained, **kwargs)


@register_model
def test_biformer(pretrained: bool = False, **kwargs: Any) -> BiFormer:
    """Small enough for tests (< 0.5 M parameters)."""
    return _create("test_biformer", pretrained, **kwargs)
