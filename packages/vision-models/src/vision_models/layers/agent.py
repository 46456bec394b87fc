"""Agent attention: a few pooled tokens collect from all tokens, and all tokens read from them.

Paper: Han et al., Agent Attention: On the Integration of Softmax and Linear Attention, ECCV 2024, arXiv 2312.08874.
Official code: LeapLabTHU/Agent-Attention, ``agent_transformer/models/agent_*.py`` and ``downstream``, whose four
networks each hold a copy of the attention. Here it stands once, between the projections: ``deit.py``, ``pvt.py``,
``swin.py`` and ``cswin.py`` make queries, keys and values, hand them over, and project the result. The networks of
InLine attention (``inline.py``) are the same four, so a host written once serves both.

The same as there: every number. Agents are pooled from the projected queries; both products have the scale D^−½; a
depthwise convolution of the values is added.

What differs: the two products are attn_core's, so that nothing of size N×N is made, and biases are not repeated for
each image. Bias tables follow the map: the official classification code stretches them at loading, the detection code
at each forward pass; the two agree, and here every forward pass does it.

Numbers are checked in ``tests/layers/test_agent.py`` against a formulation with both softmaxes in full.

Shapes: q, k, v (B, N, C) → (B, N, C), N = Y·X, plus one with a class token.
"""

# pyright: reportPrivateImportUsage=false
# (timm.layers exports these names, though it lists none)

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from attn_core import agent_attention
from vision_models.initialization import trunc_normal_
from vision_models.layers.token_maps import DepthwiseConv

__all__ = ["AgentMixing"]

BIAS_SIDE = 7  # of the small maps that biases are stretched from


def mean_cells(x: Tensor, shape: tuple[int, int]) -> Tensor:
    """``F.adaptive_avg_pool2d`` as two products: ONNX knows that pooling for maps of one size alone.

    (B, C, Y, X) → (B, C, *shape).
    """
    for axis, cells in ((2, shape[0]), (3, shape[1])):
        length = x.shape[axis]
        cell, place = torch.arange(cells, device=x.device)[:, None], torch.arange(length, device=x.device)
        # cell i begins at ⌊i·length/cells⌋ and ends before ⌈(i + 1)·length/cells⌉
        inside = (place >= cell * length // cells) & (place < ((cell + 1) * length + cells - 1) // cells)
        weight = inside.to(x.dtype) / inside.sum(1, keepdim=True)
        x = torch.einsum("ay,bcyx->bcax" if axis == 2 else "ax,bcyx->bcya", weight, x)
    return x


class AgentMixing(nn.Module):
    """softmax(q·a + B₂) softmax(a·k + B₁) v + dwc(v), agents a pooled from q (eq. 5 and 6), without projections.

    Args:
        grid: rows and columns of the map that the bias tables are made for; other maps stretch them.
        agents: how many; a square, the agents are the cells of a grid.
        kv_grid: the same of keys and values, where their map is smaller than that of the queries.
        shape: rows and columns of another grid of agents, for large images; biases are stretched along it, too.
        class_token: the first token stands outside the map and is neither pooled nor convolved.

    Shapes: q (B, N, dim), k, v (B, M, dim), source unused, grid (Y, X) of the queries and kv_grid of the keys if it is
    another → (B, N, dim).
    Raises: ValueError if ``agents`` is no square or ``shape`` is empty.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        agents: int,
        *,
        kv_grid: tuple[int, int] | None = None,
        shape: tuple[int, int] | None = None,
        class_token: bool = False,
        **dd: Any,
    ) -> None:
        super().__init__()
        self.side = math.isqrt(max(agents, 0))
        if self.side < 1 or self.side**2 != agents:
            raise ValueError(f"AgentMixing: agents must be the square of a positive number, got agents={agents}")
        self.shape: tuple[int, int] = (self.side, self.side) if shape is None else (shape[0], shape[1])
        if min(self.shape) < 1:
            raise ValueError(f"AgentMixing: shape must be two positive numbers, got shape={shape}")
        self.num_heads = num_heads
        self.dwc = DepthwiseConv(dim, 3, **dd)

        def table(*size: int) -> nn.Parameter:
            return nn.Parameter(trunc_normal_(torch.empty(*size, **dd), std=0.02))

        # Letters of the released weights: a agent, n token of the small map, h row, w column, c class token; the
        # first letter is the one that asks. Their axes of length 1 are left out: torch refuses to put a model with
        # parameters of five axes into channels-last memory.
        height, width = grid
        kv_height, kv_width = grid if kv_grid is None else kv_grid
        self.an_bias = table(num_heads, agents, BIAS_SIDE, BIAS_SIDE)
        self.na_bias = table(num_heads, agents, BIAS_SIDE, BIAS_SIDE)
        self.ah_bias = table(num_heads, agents, kv_height)
        self.aw_bias = table(num_heads, agents, kv_width)
        self.ha_bias = table(num_heads, height, agents)
        self.wa_bias = table(num_heads, width, agents)
        self.ac_bias = table(1, num_heads, agents, 1) if class_token else None
        self.ca_bias = table(1, num_heads, 1, agents) if class_token else None

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        source: Tensor,  # noqa: ARG002  for mixing that reads it
        grid: tuple[int, int],
        kv_grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """q (B, N, C), k, v (B, M, C) → (B, N, C); tokens before the ``grid`` skip the convolution."""
        batch, tokens, dim = q.shape
        height, width = grid
        before = tokens - height * width

        def heads(x: Tensor) -> Tensor:
            return x.reshape(batch, x.shape[1], self.num_heads, dim // self.num_heads).transpose(1, 2)

        q_map = q[:, before:].reshape(batch, height, width, dim).permute(0, 3, 1, 2)
        pool = mean_cells if torch.compiler.is_exporting() else F.adaptive_avg_pool2d
        agents = heads(pool(q_map, self.shape).flatten(2).transpose(1, 2))
        agent_bias, query_bias = self.biases(grid, kv_grid)
        out = agent_attention(heads(q), heads(k), heads(v), agents, agent_bias=agent_bias, query_bias=query_bias)
        out = out.transpose(1, 2).reshape(batch, tokens, dim)

        v_map = v[:, before:].reshape(batch, *(kv_grid or grid), dim)
        if kv_grid is not None:
            v_map = F.interpolate(v_map.permute(0, 3, 1, 2), size=grid, mode="bilinear").permute(0, 2, 3, 1)
        local = self.dwc(v_map).reshape(batch, height * width, dim)
        return out + local if before == 0 else torch.cat([out[:, :before], out[:, before:] + local], 1)

    def biases(self, grid: tuple[int, int], kv_grid: tuple[int, int] | None = None) -> tuple[Tensor, Tensor]:
        """B₁ (1, H, A, M) of the agents that collect, B₂ (1, H, N, A) of the tokens that read, for maps of M and N."""
        agent_bias = self.stretched(self.an_bias, self.ah_bias, self.aw_bias, kv_grid or grid)
        rows, columns = self.ha_bias.transpose(1, 2), self.wa_bias.transpose(1, 2)
        query_bias = self.stretched(self.na_bias, rows, columns, grid).transpose(2, 3)
        ac, ca = self.ac_bias, self.ca_bias
        if ac is not None and ca is not None:
            agent_bias, query_bias = torch.cat([ac, agent_bias], 3), torch.cat([ca, query_bias], 2)
        return agent_bias, query_bias

    def stretched(self, small: Tensor, rows: Tensor, columns: Tensor, grid: tuple[int, int]) -> Tensor:
        """Small maps (H, A, 7, 7) + rows (H, A, Y') + columns (H, A, X') → bias of agents and tokens (1, H, A', N)."""
        bias = F.interpolate(small, size=grid, mode="bilinear")
        bias = bias + F.interpolate(rows, size=grid[0], mode="linear").unsqueeze(3)
        bias = (bias + F.interpolate(columns, size=grid[1], mode="linear").unsqueeze(2)).flatten(2)
        if self.shape != (self.side, self.side):
            cells = bias.transpose(1, 2).reshape(bias.shape[0], -1, self.side, self.side)
            bias = F.interpolate(cells, size=self.shape, mode="bilinear").flatten(2).transpose(1, 2)
        return bias.unsqueeze(0)


register_notrace_module(AgentMixing)  # not as decorator, which would hide the type
