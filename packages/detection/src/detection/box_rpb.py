"""BoxRPB: global cross-attention with a bias from each query's box to each pixel (Plain-DETR, eq. 3–5).

The bias is a sum of one value per row and one per column. `attn_core.attention` adds both while it computes the scores,
so that no (queries × pixels) tensor exists; the MLP that makes them runs over chunks of queries and again in the
backward pass, so that its hidden layer is never stored whole.

Official code: https://github.com/impiga/Plain-DETR, ``models/global_rpe_decomp_decoder.py`` and
``global_ape_decoder.py``. Checked in: ``test_plain_detr.py``; measured by ``detection benchmark``.
"""

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attn_core import attention

PositionBias = Literal["linear", "log", "none"]
CHUNK = 256  # queries whose hidden layer is in memory at one time


class BoxRPBAttention(nn.Module):
    """Cross-attention from boxes to one map.

    Args:
        position_bias: ``"linear"`` feeds offsets in pixels to the MLP, ``"log"`` sign(d)·log₂(1 + |d|)/3, ``"none"``
            leaves the bias out.
        hidden_dim: of the MLPs 2 → hidden → heads.
        stride: pixels per cell of the map.

    Raises: ValueError for an unknown ``position_bias``, or if ``num_heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        dim: int = 256,
        num_heads: int = 8,
        *,
        position_bias: PositionBias = "linear",
        hidden_dim: int = 512,
        stride: int = 16,
    ) -> None:
        super().__init__()
        if position_bias not in ("linear", "log", "none"):
            raise ValueError(
                f"BoxRPBAttention: position_bias must be 'linear', 'log' or 'none', got position_bias={position_bias!r}"
            )
        if dim % num_heads:
            raise ValueError(f"BoxRPBAttention: dim={dim} is not a multiple of num_heads={num_heads}")
        self.num_heads = num_heads
        self.position_bias = position_bias
        self.stride = stride
        if position_bias != "none":
            self.cpb_mlp1 = _mlp(hidden_dim, num_heads)  # x
            self.cpb_mlp2 = _mlp(hidden_dim, num_heads)  # y
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def axis_bias(
        self, boxes: Float[Tensor, "B N 4"], size: tuple[int, int]
    ) -> tuple[Float[Tensor, "B H N y"], Float[Tensor, "B H N x"]]:
        """Bias of each row and each column, for cxcywh boxes in pixels of the padded image."""
        center, half = boxes[..., :2], boxes[..., 2:] / 2
        low, high = center - half, center + half
        x = self._table(self.cpb_mlp1, torch.stack([low[..., 0], high[..., 0]], -1), size[1])
        y = self._table(self.cpb_mlp2, torch.stack([low[..., 1], high[..., 1]], -1), size[0])
        return y, x

    def _table(self, mlp: nn.Module, edges: Float[Tensor, "B N 2"], length: int) -> Float[Tensor, "B H N length"]:
        cells = (torch.arange(length, device=edges.device, dtype=edges.dtype) + 0.5) * self.stride

        def part(edges: Tensor) -> Tensor:
            offset = edges[:, :, None] - cells[:, None]
            if self.position_bias == "log":
                offset = offset.sign() * torch.log2(offset.abs() + 1) / math.log2(8)
            return mlp(offset).permute(0, 3, 1, 2)

        if not (torch.is_grad_enabled() and self.training) or edges.shape[1] <= CHUNK:
            return torch.cat([part(own) for own in edges.split(CHUNK, 1)], 2)
        parts = [checkpoint(part, own, use_reentrant=False) for own in edges.split(CHUNK, 1)]
        return torch.cat(parts, 2)  # pyright: ignore

    def forward(
        self,
        query: Float[Tensor, "B N C"],
        boxes: Float[Tensor, "B N 4"],
        key: Float[Tensor, "B M C"],
        value: Float[Tensor, "B M C"],
        size: tuple[int, int],
        *,
        visible: Bool[Tensor, "B M"] | None = None,
        soft_mask: bool = False,
    ) -> Float[Tensor, "B N C"]:
        """Attend.

        Args:
            boxes: cxcywh in pixels of the padded image.
            key: content plus position. value: content.
            size: rows and columns of the map, M = rows·columns.
            visible: False on padding.
            soft_mask: subtract 100 from the scores of padding, as the official code does, instead of hiding it.
        """
        q, k, v = (
            layer(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer, x in ((self.q, query), (self.k, key), (self.v, value))
        )
        tables = None
        if self.position_bias != "none":
            tables = tuple(table.to(q.dtype) for table in self.axis_bias(boxes, size))
        bias = None
        if visible is not None and soft_mask:
            bias = -100.0 * (~visible)[:, None, None].to(q.dtype)
            visible = None
        out = attention(q, k, v, axis_bias=tables, bias=bias, key_mask=visible)[0]
        return self.proj(out.transpose(1, 2).flatten(2))


def _mlp(hidden_dim: int, num_heads: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, num_heads, bias=False))
