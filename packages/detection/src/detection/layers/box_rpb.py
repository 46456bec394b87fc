"""BoxRPB: global cross-attention with a bias from each query's box to each pixel (Plain-DETR, eq. 3–5).

The bias is a sum of one value per row and one per column. `attn_core.attention` adds both while it computes the scores,
so that no (queries × pixels) tensor exists. The MLP that makes them runs over a few queries at a time, whose hidden
layer fits into the cache, and again in the backward pass, which sums the gradients of its weights as it goes: at 1,800
queries, 134 rows and columns and 512 hidden units that layer would take 494 MB.

Official code: https://github.com/impiga/Plain-DETR, ``models/global_rpe_decomp_decoder.py`` and
``global_ape_decoder.py``. Checked in: ``models/plain_detr/test_detector.py``; measured by ``detection benchmark``.
"""

import math
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from attn_core import attention

PositionBias = Literal["linear", "log", "none"]
# Rows of the hidden layer that are in memory at one time: 2 MiB of float32 at 512 units on a CPU.
CPU_ROWS, GPU_ROWS = 1024, 65536


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

    def _table(self, mlp: nn.Sequential, edges: Float[Tensor, "B N 2"], length: int) -> Float[Tensor, "B H N length"]:
        cells = (torch.arange(length, device=edges.device, dtype=edges.dtype) + 0.5) * self.stride
        first, last = mlp[0], mlp[2]
        batch, count = edges.shape[:2]
        if torch.compiler.is_compiling():  # a loop over tiles would fix the batch size of an exported graph
            offsets = _inputs(edges.flatten(0, 1), cells, self.position_bias == "log")[:, :2]
            return mlp(offsets).view(batch, count, length, -1).permute(0, 3, 1, 2)
        table = _EdgeTable.apply(
            edges.flatten(0, 1), cells, first.weight, first.bias, last.weight, self.position_bias == "log"
        )
        return table.view(batch, count, length, -1).permute(0, 3, 1, 2)

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


class _EdgeTable(torch.autograd.Function):
    """MLP of the offsets of every pair of edges to every cell, (R, 2) and (length,) → (R, length, H).

    Always in the dtype of the edges: offsets of hundreds of pixels do not fit half precision.
    """

    @staticmethod
    def forward(
        ctx: Any, edges: Tensor, cells: Tensor, weight: Tensor, bias: Tensor, last: Tensor, log: bool
    ) -> Tensor:
        ctx.save_for_backward(edges, cells, weight, bias, last)
        ctx.log = log
        first = torch.cat([weight, bias[:, None]], 1).to(edges.dtype)
        out = edges.new_empty(len(edges), len(cells), len(last))
        step = _rows_at_a_time(edges, cells)
        with torch.autocast(edges.device.type, enabled=False):
            for start in range(0, len(edges), step):
                hidden = _inputs(edges[start : start + step], cells, log) @ first.T
                rows = hidden.relu_() @ last.to(edges.dtype).T
                out[start : start + step] = rows.view(-1, len(cells), len(last))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        edges, cells, weight, bias, last = ctx.saved_tensors
        first = torch.cat([weight, bias[:, None]], 1).to(edges.dtype)
        second = last.to(edges.dtype)
        to_first, to_second, to_edges = torch.zeros_like(first), torch.zeros_like(second), torch.zeros_like(edges)
        step = _rows_at_a_time(edges, cells)
        for start in range(0, len(edges), step):
            own = edges[start : start + step]
            rows = grad[start : start + step].reshape(-1, len(second))
            inputs = _inputs(own, cells, ctx.log)
            hidden = (inputs @ first.T).relu_()
            to_second.addmm_(rows.T, hidden)
            to_hidden = torch.ops.aten.threshold_backward(rows @ second, hidden, 0)
            to_first.addmm_(to_hidden.T, inputs)
            if ctx.needs_input_grad[0]:
                slope = (to_hidden @ first[:, :2]).view(len(own), len(cells), 2)
                if ctx.log:
                    distance = (own[:, None] - cells[:, None]).abs()
                    slope = slope / ((distance + 1) * (math.log(2) * math.log2(8)))
                to_edges[start : start + step] = slope.sum(1)
        return (
            to_edges if ctx.needs_input_grad[0] else None,
            None,
            to_first[:, :2].to(weight.dtype),
            to_first[:, 2].to(bias.dtype),
            to_second.to(last.dtype),
            None,
        )


def _rows_at_a_time(edges: Tensor, cells: Tensor) -> int:
    return max(1, (GPU_ROWS if edges.is_cuda else CPU_ROWS) // len(cells))


def _inputs(edges: Float[Tensor, "R 2"], cells: Float[Tensor, " length"], log: bool) -> Float[Tensor, "R*length 3"]:
    """Offsets of the two edges to each cell, and 1 for the bias of the first layer."""
    offset = edges[:, None] - cells[:, None]
    if log:
        offset = offset.sign() * torch.log2(offset.abs() + 1) / math.log2(8)
    return torch.nn.functional.pad(offset, (0, 1), value=1.0).flatten(0, 1)


def _mlp(hidden_dim: int, num_heads: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, hidden_dim), nn.ReLU(inplace=True), nn.Linear(hidden_dim, num_heads, bias=False))
