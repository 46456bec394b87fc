"""Halo attention and bottleneck attention: softmax attention with learned logits for row and column offsets.

Papers: Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones, CVPR 2021, arXiv
2103.12731 (no official code); Srinivas et al., Bottleneck Transformers for Visual Recognition, CVPR 2021, arXiv
2101.11605. The released weights are timm's, ``timm/layers/halo_attn.py`` and ``bottleneck_attn.py``; names of
parameters and numbers are theirs.

What differs: keys and values of the overlapping windows are read where they are (``attn_core.block_attention``), not
unfolded into (block + 2·halo)² / block² copies; blocks may leave the map, so that every size works.

Numbers are checked in ``tests/models/test_halonet.py`` against timm.

Shapes: (B, C, Y, X) → (B, dim_out, ⌈Y/stride⌉, ⌈X/stride⌉).
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import make_divisible
from timm.models import register_notrace_module
from torch import Tensor, nn

from attn_core import attention, block_attention, halo_index, window_index
from vision_models.initialization import trunc_normal_
from vision_models.layers.token_maps import Linear

Border = Literal["zero", "masked"]


def offset_logits(q: Tensor, table: Tensor, period: int, span: int, axis: int) -> Tensor:
    """Logits of each query for every row (or column) u of its window: q·table[u − i + middle].

    i counts the query's rows (axis 2) or columns (axis 3) within its block. Offsets beyond the table have its last
    entry.

    Args:
        q: (B, H, Y, X, D). table: (odd, D), offset 0 in the middle.
        period: side of a block. span: side of a window.

    Returns:
        (B, H, Y·X, span).
    """
    at = torch.arange(q.shape[axis], device=q.device) % period
    offset = torch.arange(span, device=q.device) - at[:, None]
    rows = (offset + table.shape[0] // 2).clamp(0, table.shape[0] - 1)
    equation = "bhyxd,yud->bhyxu" if axis == 2 else "bhyxd,xud->bhyxu"
    return torch.einsum(equation, q, table[rows]).flatten(2, 3)


def halo_attention(
    q: Tensor, kv: Tensor, height_rel: Tensor, width_rel: Tensor, block: int, halo: int, stride: int, masked: bool
) -> Tensor:
    """Each block of queries reads the window of its block of keys and a border of ``halo`` tokens around it.

    Args:
        q: (B, Y', X', H, D), every stride-th token; kv: (B, Y, X, H, D + D_v).
        height_rel, width_rel: (2·window − 1, D), window = block + 2·halo.
        block: side of a block of keys; its queries are those that stand in it, every ``stride``-th.
        masked: hide keys outside the map. Otherwise they take part with key and value 0: the position's logit is left.

    Returns:
        (B, Y', X', H·D_v).
    """
    batch, height, width, heads, dim = q.shape
    rows, columns = kv.shape[1], kv.shape[2]
    span = block + 2 * halo
    side = block // stride
    q_index = window_index(height, width, (side, side), device=q.device)
    kv_index = halo_index(rows, columns, (block, block), (halo, halo), device=q.device)
    tokens = kv.flatten(1, 2)
    if not masked:  # one token of zeros behind the others stands for all that is outside
        tokens = F.pad(tokens, (0, 0, 0, 0, 0, 1))
        kv_index = torch.where(kv_index < 0, rows * columns, kv_index)
    k, v = tokens[..., :dim].transpose(1, 2), tokens[..., dim:].transpose(1, 2)
    queries = q.permute(0, 3, 1, 2, 4)
    bias = [offset_logits(queries, height_rel, side, span, 2), offset_logits(queries, width_rel, side, span, 3)]
    out, _ = block_attention(queries.flatten(2, 3), k, v, q_index, kv_index, axis_bias=bias)
    return out.transpose(1, 2).reshape(batch, height, width, heads * v.shape[3])


def bottleneck_attention(q: Tensor, k: Tensor, v: Tensor, height_rel: Tensor, width_rel: Tensor) -> Tensor:
    """Every token reads the whole map: q, k (B, Y, X, H, D), v (B, Y, X, H, D_v) → (B, Y, X, H·D_v)."""
    height, width = q.shape[1:3]
    queries = q.permute(0, 3, 1, 2, 4)
    bias = [offset_logits(queries, height_rel, height, height, 2), offset_logits(queries, width_rel, width, width, 3)]
    k, v = (x.flatten(1, 2).transpose(1, 2) for x in (k, v))
    out, _ = attention(queries.flatten(2, 3), k, v, axis_bias=bias)
    return out.transpose(1, 2).reshape(*q.shape[:3], q.shape[3] * v.shape[3])


class HaloAttention(nn.Module):
    """Attention of blocks to the blocks and a border around them, without output projection.

    Args:
        dim, dim_out: channels that enter, and all heads' values together.
        stride: 2 keeps every second query; where ``block`` is odd, averages 2×2 results instead.
        head_dim: of queries and keys; by default ``dim · qk_ratio`` (a multiple of 8) shared by the heads.
        border: ``"masked"`` hides what lies outside the map; ``"zero"``, as the weights were trained, does not.

    Shapes: (B, dim, Y, X) → (B, dim_out, ⌈Y/stride⌉, ⌈X/stride⌉).
    """

    def __init__(
        self,
        dim: int,
        dim_out: int,
        *,
        stride: int,
        num_heads: int,
        head_dim: int | None,
        qk_ratio: float,
        block: int,
        halo: int,
        border: Border,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = head_dim or make_divisible(dim * qk_ratio, divisor=8) // num_heads
        self.block, self.halo = block, halo
        self.masked = border == "masked"
        pooled = stride > 1 and block % stride != 0
        self.query_stride = 1 if pooled else stride
        self.q = Linear(dim, num_heads * self.head_dim, bias=False, **dd)
        self.kv = Linear(dim, num_heads * self.head_dim + dim_out, bias=False, **dd)
        self.height_rel = nn.Parameter(torch.empty(2 * (block + 2 * halo) - 1, self.head_dim, **dd))
        self.width_rel = nn.Parameter(torch.empty(2 * (block + 2 * halo) - 1, self.head_dim, **dd))
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if pooled else nn.Identity()

    def reset_parameters(self) -> None:
        """Draw projections and position tables anew, as the paper's code does."""
        for projection in (self.q, self.kv):
            trunc_normal_(projection.weight, std=projection.in_features**-0.5)  # pyright: ignore[reportArgumentType, reportOperatorIssue]
        for table in (self.height_rel, self.width_rel):
            trunc_normal_(table, std=self.head_dim**-0.5)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, Y', X', H, D) and, head by head, keys and values (B, Y, X, H, D + D_v) of x (B, dim, Y, X)."""
        tokens = x.permute(0, 2, 3, 1)
        strided = tokens[:, :: self.query_stride, :: self.query_stride]
        kv = self.kv(tokens)
        return self.q(strided).unflatten(-1, (self.num_heads, self.head_dim)), kv.unflatten(-1, (self.num_heads, -1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) → (B, C', Y', X'), smaller by the query stride and the pooling."""
        q, kv = self.project(x)
        out = halo_attention(
            q, kv, self.height_rel, self.width_rel, self.block, self.halo, self.query_stride, self.masked
        )
        return self.pool(out.permute(0, 3, 1, 2))


class BottleneckAttention(nn.Module):
    """Attention of all tokens to all, for maps of about one size: offsets beyond the tables have their last entries.

    Args:
        stride: 2 averages 2×2 results.
        feat_size: rows and columns of the map that the tables are made for.

    Shapes: (B, dim, Y, X) → (B, dim, ⌈Y/stride⌉, ⌈X/stride⌉).
    """

    def __init__(self, dim: int, *, stride: int, num_heads: int, feat_size: tuple[int, int], **dd: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.qkv = Linear(dim, 3 * dim, bias=False, **dd)
        self.height_rel = nn.Parameter(torch.empty(2 * feat_size[0] - 1, self.head_dim, **dd))
        self.width_rel = nn.Parameter(torch.empty(2 * feat_size[1] - 1, self.head_dim, **dd))
        self.pool = nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False) if stride > 1 else nn.Identity()

    def reset_parameters(self) -> None:
        """Draw projection and position tables anew."""
        trunc_normal_(self.qkv.weight, std=self.qkv.in_features**-0.5)  # pyright: ignore[reportArgumentType, reportOperatorIssue]
        for table in (self.height_rel, self.width_rel):
            trunc_normal_(table, std=self.head_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, Y, X) of the table's size → (B, C', Y', X')."""
        q, k, v = self.qkv(x.permute(0, 2, 3, 1)).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(3)
        out = bottleneck_attention(q, k, v, self.height_rel, self.width_rel)
        return self.pool(out.permute(0, 3, 1, 2))


# Leaves of a traced graph: their windows depend on the size of the map.
register_notrace_module(HaloAttention)
register_notrace_module(BottleneckAttention)
