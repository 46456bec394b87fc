"""Bi-level routing attention, the module that BiFormer is built of: choose regions first, then attend to their tokens.

Paper: Zhu et al., CVPR 2023, arXiv 2303.08810, eq. 2–8. Official code: rayleizhu/BiFormer, ``ops/bra_legacy.py`` and
``ops/bra_nchw.py``. What is the same, what differs and where it is checked stands in
:mod:`vision_models.models.biformer`.

Shapes: (B, Y, X, C) → (B, Y, X, C), any Y and X.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.models import register_notrace_function
from torch import Tensor, nn

from attn_core import block_attention, topk_route, window_index
from vision_models.layers.token_maps import DepthwiseConv, Linear, pad_to_multiple

PadMode = Literal["legacy", "nchw", "masked"]
KeyPooling = Literal["identity", "ada_avgpool", "ada_maxpool", "avgpool", "maxpool"]
KEY_POOLINGS: dict[str, type[nn.Module]] = {
    "identity": nn.Identity,
    "ada_avgpool": nn.AdaptiveAvgPool2d,
    "ada_maxpool": nn.AdaptiveMaxPool2d,
    "avgpool": nn.AvgPool2d,
    "maxpool": nn.MaxPool2d,
}

# The functions below hold Python decisions about sizes; register_notrace_function keeps FX from tracing into them.


@register_notrace_function
def regions_per_side(height: int, width: int, n_win: int, auto_side: int) -> int:
    """``n_win``, or with ``auto_side`` > 0 a number that is ``n_win`` on a map of that side and grows as (Y·X)^⅓."""
    if auto_side == 0:
        return n_win
    return max(1, int(n_win * (height * width / (auto_side * auto_side)) ** (1.0 / 3.0) + 0.5))


@register_notrace_function
def region_size(height: int, width: int, n_win: int, floor: bool) -> tuple[int, int]:
    """Tokens of one region (rows, columns); rounded up, or down for ``pad_mode="nchw"``, which then adds regions."""
    if floor:
        return max(1, height // n_win), max(1, width // n_win)
    return -(-height // n_win), -(-width // n_win)


@register_notrace_function
def pad_to_regions(x: Tensor, rows: int, columns: int, allowed: bool) -> Tensor:
    """:func:`pad_to_multiple`, unless ``auto_pad=False`` forbids it."""
    if not allowed and (x.shape[1] % rows != 0 or x.shape[2] % columns != 0):
        raise ValueError(
            f"biformer: a map of {x.shape[1]}×{x.shape[2]} tokens does not split into {rows}×{columns} regions; "
            "resize the image or pass auto_pad=True"
        )
    return pad_to_multiple(x, rows, columns)


@register_notrace_function
def region_means(x: Tensor, region: tuple[int, int]) -> Tensor:
    """Mean token of each region, cells outside the map not counted: (B, Y, X, C) → (B, R, C)."""
    batch, height, width, channels = x.shape
    rows, columns = region
    if height % rows == 0 and width % columns == 0:  # two sums in memory order beat the general pooling
        sums = x.view(batch, height // rows, rows, width, channels).sum(2)
        sums = sums.view(batch, height // rows, width // columns, columns, channels).sum(3)
        return (sums / (rows * columns)).flatten(1, 2)
    means = F.avg_pool2d(x.permute(0, 3, 1, 2), region, ceil_mode=True, count_include_pad=False)
    return means.flatten(2).transpose(1, 2)


@register_notrace_function
def choose_regions(q_regions: Tensor, k_regions: Tensor, topk: int, scale: float) -> tuple[Tensor, Tensor]:
    """The regions each region reads and their softmax weights, (B, 1, R, K) both; K is at most the number of regions.

    Only ``n_win="auto"``, ``"nchw"`` and ``"masked"`` can meet fewer regions than ``topk``, on very small maps.
    """
    topk = min(topk, k_regions.shape[1])
    return topk_route(q_regions, k_regions, topk, scale=scale)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, L, H·D) → (B, H, L, D), a view."""
    return x.view(x.shape[0], x.shape[1], num_heads, x.shape[2] // num_heads).transpose(1, 2)


@register_notrace_function
def routed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    weight: Tensor | None,
    region: tuple[int, int],
    pooled: bool,
    num_heads: int,
    scale: float,
) -> Tensor:
    """Softmax attention of every token to the tokens of the regions in its region's row of ``table``.

    Shapes: q (B, Y, X, C'), k (B, Y, X, C') and v (B, Y, X, C), or if ``pooled`` the keys and values of the regions
    (B, R, J, ·); table and weight (B, 1, R, K) → (B, Y, X, C).
    """
    batch, height, width, _ = q.shape
    channels = v.shape[3]
    q_index = window_index(height, width, region, device=q.device)
    kv_index = q_index
    if pooled:
        kv_index = torch.arange(k.shape[1] * k.shape[2], device=q.device).view(1, 1, k.shape[1], k.shape[2])
    q, k = split_heads(q.flatten(1, 2), num_heads), split_heads(k.flatten(1, 2), num_heads)
    v = split_heads(v.flatten(1, 2), num_heads)
    out = block_attention(q, k, v, q_index, kv_index, table, kv_weight=weight, scale=scale)[0]
    return out.transpose(1, 2).reshape(batch, height, width, channels)


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
        kv_downsample_mode: KeyPooling = "identity",
        kv_per_win: int = 4,
        kv_downsample_ratio: int = 4,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.dim = dim
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
            raise ValueError(f"BiFormer: kv_downsample_mode needs pad_mode='legacy', got pad_mode={pad_mode!r}")
        self.topk = topk
        self.n_win = n_win
        self.auto_side = auto_side
        self.scale = float(qk_scale or self.qk_dim**-0.5)
        self.pad_mode = pad_mode
        self.auto_pad = auto_pad
        self.diff_routing = diff_routing
        self.soft_routing = soft_routing
        self.qkv_linear = Linear(dim, 2 * self.qk_dim + dim, **dd)
        self.output_linear = Linear(dim, dim, **dd) if param_attention == "qkvo" else nn.Identity()
        self.lepe = DepthwiseConv(dim, side_dwconv, **dd) if side_dwconv > 0 else None
        self.router = nn.Linear(self.qk_dim, self.qk_dim, **dd) if param_routing else None
        self.kv_pool = _key_pooling(kv_downsample_mode, kv_per_win, kv_downsample_ratio)

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, C) → (B, Y, X, C), any Y and X."""
        out, v = self._attend(x)
        if self.lepe is not None:
            out = out + self.lepe(v)[:, : x.shape[1], : x.shape[2]]
        return self.output_linear(out)

    def _attend(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Attention of the map, and the values for LePE; queries and keys are free again on return."""
        height, width = x.shape[1], x.shape[2]
        qkv, region, table, weight = self.route(x)

        frame = qkv
        if self.pad_mode == "nchw":
            frame = pad_to_regions(qkv, region[0], region[1], self.auto_pad)  # zero keys, part of the softmax
        # One split, so that autograd joins the three gradients by one copy.
        q, k, v = frame.split([self.qk_dim, self.qk_dim, self.dim], dim=-1)
        keys, values = k, v
        if self.kv_pool is not None:
            pooled = self._pool_regions(torch.cat([k, v], dim=-1), region)
            keys, values = pooled[..., : self.qk_dim], pooled[..., self.qk_dim :]
        weight = weight if self.soft_routing else None
        out = routed_attention(
            q, keys, values, table, weight, region, self.kv_pool is not None, self.num_heads, self.scale
        )
        v = v[:, : qkv.shape[1], : qkv.shape[2]]
        if not torch.is_grad_enabled():
            v = v.contiguous()  # the convolution would copy it anyway, and the view would keep queries and keys
        return out[:, :height, :width], v

    def route(self, x: Tensor) -> tuple[Tensor, tuple[int, int], Tensor, Tensor]:
        """The projected map and where its regions look: qkv, tokens per region, table and weights (B, 1, R, K).

        Region r stands at row r // columns and column r % columns of ⌈Y/rows⌉ × ⌈X/columns⌉ regions.
        """
        n_win = regions_per_side(x.shape[1], x.shape[2], self.n_win, self.auto_side)
        if self.pad_mode == "legacy":
            # Before the projection, so that queries, keys and values of the padding equal the bias.
            x = pad_to_regions(x, n_win, n_win, self.auto_pad)
        qkv = self.qkv_linear(x)
        region = region_size(qkv.shape[1], qkv.shape[2], n_win, self.pad_mode == "nchw")
        q_and_k = qkv[..., : 2 * self.qk_dim]
        means = region_means(q_and_k if self.diff_routing else q_and_k.detach(), region)
        q_regions, k_regions = means[..., : self.qk_dim], means[..., self.qk_dim :]
        if self.router is not None:
            q_regions, k_regions = self.router(q_regions), self.router(k_regions)
        table, weight = choose_regions(q_regions, k_regions, self.topk, self.scale)
        return qkv, region, table, weight

    def _pool_regions(self, kv: Tensor, region: tuple[int, int]) -> Tensor:
        """Pool keys and values inside each region: (B, Y, X, C) → (B, R, J, C)."""
        batch, height, width, channels = kv.shape
        rows, columns = height // region[0], width // region[1]
        kv = kv.view(batch, rows, region[0], columns, region[1], channels).permute(0, 1, 3, 5, 2, 4)
        assert self.kv_pool is not None
        pooled = self.kv_pool(kv.reshape(batch * rows * columns, channels, region[0], region[1]))
        return pooled.flatten(2).transpose(1, 2).reshape(batch, rows * columns, pooled[0, 0].numel(), channels)


def _key_pooling(mode: str, per_win: int, ratio: int) -> nn.Module | None:
    if mode == "identity" or (mode in ("avgpool", "maxpool") and ratio == 1):
        return None
    size = per_win if mode.startswith("ada_") else ratio
    if mode not in KEY_POOLINGS or size < 1:
        choices = ", ".join(map(repr, KEY_POOLINGS))
        raise ValueError(
            f"BiFormer: kv_downsample_mode must be one of {choices} with a positive size, got {mode!r}, {size}"
        )
    return KEY_POOLINGS[mode](size)
