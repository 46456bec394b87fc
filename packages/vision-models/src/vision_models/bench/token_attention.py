"""Token networks beside their official formulation, which holds the scores of attention in full."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vision_models.backbone import StagedBackbone
from vision_models.bench.measure import model_rows
from vision_models.layers.token_maps import Linear
from vision_models.models.dhvt import HeadTokenAttention

PEER = "scores in full"


def rows(name: str, ours: StagedBackbone, x: Tensor, *, compiled: bool) -> list[dict[str, Any]]:
    """Those of the model."""
    return model_rows(name, ours, in_full(ours), PEER, x, compiled=compiled)


def in_full(model: StagedBackbone) -> StagedBackbone:
    """A copy of ``model`` with the same parameters in the official formulation."""
    peer = copy.deepcopy(model)
    for module in peer.modules():
        if isinstance(module, HeadTokenAttention):
            module.__class__ = FullHeadTokenAttention
        elif isinstance(module, Linear):
            module.__class__ = nn.Linear  # pyright: ignore[reportAttributeAccessIssue]
    return peer


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, H, N, D) → (B, N, H·D)."""
    scores = (q @ k.transpose(-2, -1)) * q.shape[3] ** -0.5
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
