"""NAT and TransNeXt beside the formulation of their official code, which copies the window of every token; and natten.

What natten computes on a CPU goes through its flex_attention path, which has no tables of relative positions and no
backward pass there: its rows are forward passes of the same network with those tables at 0.
"""

import copy
import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_models.backbone import StagedBackbone
from vision_models.bench.measure import forward, linear_row, model_rows, row, times
from vision_models.layers.neighborhood import NeighborhoodAttention
from vision_models.layers.token_maps import Linear
from vision_models.models.transnext import WINDOW, AggregatedAttention, MapAttention

PEER = "windows copied"
NEIGHBORHOOD: Any = NeighborhoodAttention  # timm's decorators of these classes hide their attributes from type checkers
AGGREGATED: Any = AggregatedAttention
MAP: Any = MapAttention


def rows(name: str, ours: StagedBackbone, x: Tensor, *, compiled: bool) -> list[dict[str, Any]]:
    """Those of the model, its linear layers by themselves, and its forward pass beside natten where that fits."""
    found = model_rows(name, ours, copied(ours), PEER, x, compiled=compiled)
    if compiled:
        return found
    return [found[0], linear_row(name, ours, x), *found[1:], *natten_rows(name, ours, x[:1])]


def copied(model: StagedBackbone) -> StagedBackbone:
    """A copy of ``model`` with the same parameters that copies the keys and values of every window.

    Raises: ValueError: the model has no windows.
    """
    if not any(isinstance(module, (NEIGHBORHOOD, AGGREGATED)) for module in model.modules()):
        raise ValueError(
            f"benchmark: {type(model).__name__} with attention to the whole map has no peer to compare with"
        )
    peer = copy.deepcopy(model)
    kinds: dict[Any, Any] = {NEIGHBORHOOD: Gathered, AGGREGATED: Unfolded, MAP: InFull, Linear: nn.Linear}
    for module in peer.modules():
        module.__class__ = kinds.get(type(module), type(module))
    return peer


def keys_of(length: int, kernel: int, dilation: int) -> tuple[Tensor, Tensor]:
    """(length, kernel): the cells of an axis that each cell sees, and where each stands in the table."""
    cell = torch.arange(length)[:, None]
    group, place = cell % dilation, cell // dilation
    last = (length - 1 - group) // dilation  # place of the last cell of the group
    first = (place - kernel // 2).clamp(min=0).minimum(last - kernel + 1)
    seen = first + torch.arange(kernel)
    return group + dilation * seen, seen - place + kernel - 1


class Gathered(NEIGHBORHOOD):
    """Keys and values of each window in new memory, kernel_size² times as many."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, dim) → the same."""
        q, k, v = self.projected(x)
        height, width = q.shape[2:4]
        (rows, down), (columns, right) = (keys_of(n, self.kernel_size, self.dilation) for n in (height, width))
        cells = (rows[:, None, :, None] * width + columns[None, :, None, :]).flatten(2).flatten(0, 1)
        bias = self.rpb[:, down[:, None, :, None], right[None, :, None, :]].flatten(3).flatten(1, 2)
        q, k, v = (t.flatten(2, 3) for t in (q, k, v))
        scores = (k[:, :, cells] @ (q * q.shape[3] ** -0.5)[..., None])[..., 0] + bias
        out = (scores.softmax(3)[..., None, :] @ v[:, :, cells])[..., 0, :]
        out = out.transpose(1, 2).unflatten(1, (height, width)).flatten(3)
        return self.proj(out[:, : x.shape[1], : x.shape[2]])


class Unfolded(AGGREGATED):
    """Windows unfolded, and one softmax over their scores and those of the pooled map side by side."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, dim) → the same."""
        q = F.normalize(self.q(x).flatten(1, 2).unflatten(2, (self.num_heads, -1)).transpose(1, 2), dim=-1)
        k, v = self.kv(x).unflatten(3, (2, self.num_heads, -1)).unbind(3)
        pooled = self.pooled(x)
        sharp = self.scaled(q, self.seen(x, pooled.shape[1]))
        k_pool, v_pool = self.kv(pooled).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        outside = self._windows(torch.ones_like(x[:1, :, :, :1]).unsqueeze(3)) == 0
        near = (self._windows(F.normalize(k, dim=-1)) @ sharp[..., None])[..., 0] + self.relative_pos_bias_local[
            :, None
        ]
        far = sharp @ F.normalize(k_pool, dim=-1).mT + self.bias(x.shape[1], x.shape[2])
        weights = torch.cat([near.masked_fill(outside[..., 0], -torch.inf), far], 3).softmax(3)
        near, far = weights.split([WINDOW * WINDOW, far.shape[3]], 3)
        near = near + q @ self.learnable_tokens + self.learnable_bias
        out = ((near[..., None, :] @ self._windows(v))[..., 0, :] + far @ v_pool).transpose(1, 2)
        if self.router is not None:
            out = out * self.router(x.flatten(1, 2)).gates[..., None]
        return self.proj(out.reshape(x.shape))

    @staticmethod
    def _windows(x: Tensor) -> Tensor:
        """(B, Y, X, heads, D) → (B, heads, N, 9, D)."""
        found = F.unfold(x.flatten(3).permute(0, 3, 1, 2), WINDOW, padding=WINDOW // 2)
        return found.view(len(x), *x.shape[3:], WINDOW * WINDOW, -1).permute(0, 1, 4, 3, 2)


class InFull(MAP):
    """All scores of all heads, multiplied with gates of which some are 0."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, dim) → the same."""
        tokens = x.flatten(1, 2)
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        seen = x.new_tensor([float(tokens.shape[1])])
        scores = self.scaled(F.normalize(q, dim=-1), seen) @ F.normalize(k, dim=-1).mT
        out = ((scores + self.bias(x.shape[1], x.shape[2])).softmax(3) @ v).transpose(1, 2)
        if self.router is not None:
            out = out * self.router(tokens).gates[..., None]
        return self.proj(out.reshape(x.shape))


def natten_rows(name: str, ours: StagedBackbone, x: Tensor) -> list[dict[str, Any]]:
    """The forward pass with tables of 0 beside natten's; none where natten is missing or does not take the network.

    Without a GPU it takes heads whose width is a power of two from 8 on.
    """
    widths = [m.qkv.in_features // m.num_heads for m in ours.modules() if isinstance(m, NEIGHBORHOOD)]  # pyright: ignore[reportAttributeAccessIssue, reportOperatorIssue]
    if not widths or any(width < 8 or width & (width - 1) for width in widths):
        return []
    try:
        importlib.import_module("natten.functional")
    except ImportError:
        return []
    ours = copy.deepcopy(ours).eval()
    for module in ours.modules():
        if isinstance(module, NEIGHBORHOOD):
            nn.init.zeros_(module.rpb)  # pyright: ignore[reportArgumentType]
    peer = copy.deepcopy(ours)
    for module in peer.modules():
        module.__class__ = ThroughNatten if type(module) is NEIGHBORHOOD else type(module)
    with torch.no_grad():
        expected = peer(x)
        error = float((ours(x) - expected).abs().max() / expected.abs().max())
    setting = f"{name} without bias, batch {len(x)}, {x.shape[2]}²"
    return [row(setting, "natten", "forward, ms", times(forward, {"ours": ours, "peer": peer}, x), error)]


class ThroughNatten(NEIGHBORHOOD):
    """The windows of natten, without a table."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, dim) → the same."""
        run = importlib.import_module("natten.functional").neighborhood_attention_generic
        q, k, v = (t.permute(0, 2, 3, 1, 4).contiguous() for t in self.projected(x))
        backend = None if q.is_cuda else "flex-fna"
        out = run(q, k, v, kernel_size=(self.kernel_size,) * 2, dilation=self.dilation, backend=backend)
        return self.proj(out[:, : x.shape[1], : x.shape[2]].flatten(3))
