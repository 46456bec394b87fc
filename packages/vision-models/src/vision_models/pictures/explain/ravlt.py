"""What the last block of each RAVLT stage reads: weights and rank of linear attention, or the attention of a token."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vision_models.models.ravlt import RAVLT, GatedAttention, rotated, rotation
from vision_models.pictures.explain.panel import Panel, brightness, inputs_of, token_at


def panels(net: RAVLT, image: Tensor, point: tuple[float, float]) -> list[list[Panel]]:
    """Per stage: the weight κ of each key and the rank that it gives the product of keys and values, or attention."""
    chosen: dict[Any, int] = {}
    for number, stage in enumerate(net.stages, start=1):
        chosen[stage.blocks[-1].attn] = number  # pyright: ignore[reportAttributeAccessIssue, reportIndexIssue]
    return [_column(m, x, point, chosen[m]) for m, x in inputs_of(net, list(chosen), image).items()]  # pyright: ignore[reportArgumentType]


def key_weights(attn: GatedAttention, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """κ (H, Y, X), mean 1, and the effective ranks (H,) of Σ k vᵀ without and with it; x (1, Y, X, C).

    The effective rank is the exponential of the entropy of the singular values (Roy and Vetterli 2007).
    """
    tokens, height = x.shape[1] * x.shape[2], x.shape[1]
    q, k, v = attn.qkvo(x)[..., : 3 * attn.dim].view(tokens, 3, attn.num_heads, -1).permute(1, 2, 0, 3).unbind(0)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    logits = torch.einsum("hd,hnd->hn", q.mean(1), k) * q.shape[2] ** -0.5
    kappa = tokens * logits.softmax(-1)
    sin, cos = rotation(height, x.shape[2], q.shape[2], q)
    ranks = [_effective_rank(rotated(keys, sin, cos).transpose(1, 2) @ v) for keys in (k, k * kappa[..., None])]
    return kappa.unflatten(1, (height, -1)), ranks[0], ranks[1]


def _effective_rank(matrices: Tensor) -> Tensor:
    values = torch.linalg.svdvals(matrices.float())
    share = values / values.sum(-1, keepdim=True).clamp(min=1e-12)
    return torch.exp(-(share * share.clamp(min=1e-12).log()).sum(-1))


def _column(attn: GatedAttention, x: Tensor, point: tuple[float, float], number: int) -> list[Panel]:
    height, width = x.shape[1:3]
    row, column = token_at(point, (height, width))
    if not attn.linear:
        q, k, _ = attn.qkvo(x)[0, ..., : 3 * attn.dim].view(height * width, 3, attn.num_heads, -1).unbind(1)
        sin, cos = rotation(height, width, q.shape[2], q)
        q, k = (rotated(tokens.transpose(0, 1), sin, cos) for tokens in (q, k))
        logits = torch.einsum("hd,hnd->hn", q[:, row * width + column], k) * q.shape[2] ** -0.5
        light = brightness(logits.softmax(-1).mean(0).view(height, width))
        return [Panel(f"stage {number}: attention of the token", light, frames=[(row, column, 1, 1)])]
    kappa, before, after = key_weights(attn, x)
    size = attn.dim // attn.num_heads
    title = f"stage {number}: κ, rank {float(before.mean()):.1f} → {float(after.mean()):.1f} of {size}"
    q = F.elu(attn.qkvo(x)[0, row, column, : attn.dim].view(attn.num_heads, -1)) + 1
    keys = attn.qkvo(x)[0, ..., attn.dim : 2 * attn.dim].unflatten(-1, (attn.num_heads, -1))
    shared = torch.einsum("hd,yxhd->hyx", q, F.elu(keys) + 1) * kappa
    shares = (shared / shared.sum((1, 2), keepdim=True)).mean(0)
    token = [(row, column, 1, 1)]
    return [
        Panel(title, brightness(kappa.mean(0)), frames=token),
        Panel(f"stage {number}: κ·q·k of the token", brightness(shares), frames=token),
    ]
