"""Mixture of heads and Sparsifiner beside the formulation of their official code: everything computed, then masked."""

import copy
import math
from typing import Any

import torch
from torch import Tensor

from attn_core.composites.routed_heads import masked
from vision_models.backbone import StagedBackbone
from vision_models.bench.measure import Layers, layer_rows, model_rows
from vision_models.layers.mixture_of_heads import RoutedSelfAttention
from vision_models.models.sparsifiner import COEFFICIENTS, SparseAttention

PEER = "all computed, masked"
LEAVING_OUT: Any = (RoutedSelfAttention, SparseAttention)
SIDE = 512  # 1,024 patches, from which on pairs are left out


def rows(name: str, ours: StagedBackbone, x: Tensor, *, compiled: bool) -> list[dict[str, Any]]:
    """Those of the model on images of ``SIDE``² pixels, a batch of one, and its attention layers by themselves."""
    image = torch.randn(1, x.shape[1], SIDE, SIDE, device=x.device)
    peer = masked_peer(ours)
    found = model_rows(name, ours, peer, PEER, image, compiled=compiled)
    if compiled:
        return found
    sides = {side: attention_layers(net, image) for side, net in (("ours", ours), ("peer", peer))}
    return [*found, *layer_rows(name, "attention", PEER, sides, image)]


def attention_layers(net: StagedBackbone, x: Tensor) -> Layers:
    """Those that leave something out, with what they get for the images ``x``."""
    return Layers(net, LEAVING_OUT, x)


def masked_peer(model: StagedBackbone) -> StagedBackbone:
    """A copy of ``model`` with the same parameters that leaves nothing out.

    Raises: ValueError: the model leaves nothing out either.
    """
    if not any(isinstance(module, LEAVING_OUT) for module in model.modules()):
        raise ValueError(f"benchmark: {type(model).__name__} without mixture of heads has no peer to compare with")
    peer = copy.deepcopy(model)
    for module in peer.modules():
        if isinstance(module, RoutedSelfAttention):
            module.__class__ = AllHeads
        elif isinstance(module, SparseAttention):
            module.__class__ = AllScores
    return peer


class AllHeads(RoutedSelfAttention):
    """All heads of all tokens, multiplied with gates of which some are 0."""

    def forward(self, x: Tensor, grid: tuple[int, int] | None = None, **_: Any) -> Tensor:  # noqa: ARG002  DeiT tells the grid
        """(B, N, dim) → same."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)  # pyright: ignore[reportCallIssue]
        out = masked(q, k, v, self.router(x).gates, None, None)  # pyright: ignore[reportCallIssue]
        return self.proj(out.transpose(1, 2).flatten(2))  # pyright: ignore[reportCallIssue]


class AllScores(SparseAttention):
    """The guess of all scores, a mask from its largest, and the masked softmax of all scores."""

    def sparse(self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
        """(B, heads, 1 + N, D), with three tensors of the size of all scores."""
        with torch.no_grad():
            coefficients = self.mask_predictor.coefficients(q, k, grid)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            weights, chosen = coefficients.topk(min(COEFFICIENTS, coefficients.shape[3]), 3)
            few = torch.zeros_like(coefficients).scatter_(3, chosen, weights)
            guess = few @ self.mask_predictor.bases(grid)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            kept = guess.topk(math.ceil(self.keep * q.shape[2]), 3, sorted=False).indices  # pyright: ignore[reportOperatorIssue]
            mask = torch.zeros_like(guess).scatter_(3, kept, 1.0)
            mask = torch.cat([torch.ones_like(mask[:, :, :1]), mask], 2).bool()
        scores = (q @ k.mT) * q.shape[3] ** -0.5
        return scores.masked_fill(~mask, -torch.inf).softmax(3).nan_to_num() @ v
