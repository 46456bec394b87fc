"""Neighborhood attention between projections, with the table of relative positions that released weights have.

Papers: Hassani et al., Neighborhood Attention Transformer, CVPR 2023, arXiv 2204.07143; dilation: Hassani and Shi,
arXiv 2209.15001. Facts of ``natten`` 0.14, with which the weights were trained: the window moves back inside at the
borders, the table is indexed by key − query in steps of the dilation and added to scaled products, and a map smaller
than kernel_size · dilation is padded with zeros below and to the right *before* the projection, so that tokens outside
the map are seen with the bias as their keys and values.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from attn_core import neighborhood_attention
from vision_models.initialization import trunc_normal_
from vision_models.layers.token_maps import Linear


@register_notrace_module  # pads by the size of the map, which FX must not follow
class NeighborhoodAttention(nn.Module):
    """Every token attends to a window of kernel_size² tokens around it, ``dilation`` apart. (B, Y, X, dim) → same.

    Args:
        kernel_size: odd, at least 3.

    Raises: ValueError: kernel_size, dilation or num_heads do not fit.
    """

    def __init__(
        self, dim: int, num_heads: int, kernel_size: int = 7, dilation: int = 1, *, qkv_bias: bool = True, **dd: Any
    ) -> None:
        super().__init__()
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise ValueError(f"NeighborhoodAttention: kernel_size must be odd and at least 3, got {kernel_size}")
        if dilation < 1:
            raise ValueError(f"NeighborhoodAttention: dilation must be positive, got {dilation}")
        if dim % num_heads:
            raise ValueError(f"NeighborhoodAttention: num_heads must divide dim, got {num_heads} and {dim}")
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.dilation = dilation
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        side = 2 * kernel_size - 1
        self.rpb = nn.Parameter(trunc_normal_(torch.empty(num_heads, side, side, **dd), std=0.02))
        self.proj = Linear(dim, dim, **dd)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (B, heads, Y', X', D) of the map, padded to the reach of a window."""
        reach = self.kernel_size * self.dilation
        below, right = max(reach - x.shape[1], 0), max(reach - x.shape[2], 0)
        if below > 0 or right > 0:
            x = F.pad(x, (0, 0, 0, right, 0, below))
        qkv = self.qkv(x).unflatten(3, (3, self.num_heads, -1)).permute(3, 0, 4, 1, 2, 5)
        q, k, v = qkv.unbind(0)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, dim) → same."""
        q, k, v = self.projected(x)
        out, _ = neighborhood_attention(q, k, v, self.kernel_size, dilation=self.dilation, rpb=self.rpb)
        out = out[:, :, : x.shape[1], : x.shape[2]].permute(0, 2, 3, 1, 4)
        return self.proj(out.reshape(x.shape))
