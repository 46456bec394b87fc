"""Networks of DHVT, RVT and FAN beside their official formulation, which holds scores in full and copies windows."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_models.backbone import StagedBackbone
from vision_models.bench.measure import model_rows
from vision_models.layers.token_maps import Linear
from vision_models.layers.token_pooling import TokenPooling
from vision_models.models.dhvt import HeadTokenAttention
from vision_models.models.fan import TokenAttention
from vision_models.models.rvt import MaskedAttention

PEER = "scores in full"


def rows(name: str, ours: StagedBackbone, x: Tensor, *, compiled: bool) -> list[dict[str, Any]]:
    """Those of the model."""
    return model_rows(name, ours, in_full(ours), PEER, x, compiled=compiled)


def in_full(model: StagedBackbone) -> StagedBackbone:
    """A copy of ``model`` with the same parameters in the official formulation."""
    peer = copy.deepcopy(model)
    formulations: dict[Any, Any] = {
        HeadTokenAttention: FullHeadTokenAttention,
        MaskedAttention: FullMaskedAttention,
        TokenAttention: FullTokenAttention,
        TokenPooling: UnfoldedPooling,
        Linear: nn.Linear,
    }
    for module in peer.modules():
        module.__class__ = formulations.get(type(module), type(module))
    return peer


def full_attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor | None = None) -> Tensor:
    """(B, H, N, D) → (B, N, H·D)."""
    scores = (q @ k.transpose(-2, -1)) * q.shape[3] ** -0.5
    scores = scores if gate is None else scores * gate.expand(len(q), -1, -1, -1)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


class FullHeadTokenAttention(HeadTokenAttention):
    """Scores of all pairs, head tokens among them."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) → same."""
        batch, count, dim = x.shape
        x = self.with_head_tokens(x)
        qkv = self.qkv(x).reshape(batch, -1, 3, self.num_heads, dim // self.num_heads).permute(2, 0, 3, 1, 4)
        x = self.proj(full_attention(qkv[0], qkv[1], qkv[2]))
        first, patches, heads = torch.split(x, [1, count - 1, x.shape[1] - count], dim=1)
        return torch.cat([first + heads.mean(1, keepdim=True), patches], 1)


class FullMaskedAttention(MaskedAttention):
    """Scores of all pairs, with or without a table."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, dim) → same."""
        q, k, v = self.projected(x)  # pyright: ignore[reportCallIssue]
        return self.proj(full_attention(q, k, v, self.gate((x.shape[1], x.shape[2]))).view(x.shape))  # pyright: ignore[reportCallIssue]


class FullTokenAttention(TokenAttention):
    """Scores of all pairs."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, dim) → same."""
        q = self.q(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        k, v = self.kv(x).unflatten(2, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(full_attention(q, k, v))


class UnfoldedPooling(TokenPooling):
    """The nine neighbors of every token copied, then averaged, once for each dilation."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, Y, X, dim) → same."""
        weights = self.weights(x)  # pyright: ignore[reportCallIssue]
        cells = x.permute(0, 3, 1, 2)
        scales = [cells]
        for far in range(1, self.scales):  # pyright: ignore[reportArgumentType]
            near = F.unfold(cells, 3, dilation=far, padding=far)
            scales.append(near.view(*cells.shape[:2], 9, *cells.shape[2:]).mean(2))
        return (torch.stack(scales, 4) * weights[:, None]).sum(4).permute(0, 2, 3, 1)
