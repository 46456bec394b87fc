"""Attention rollout: which patches the blocks of a transformer mix into its answer, as one row.

Paper: Abnar and Zuidema, Quantifying Attention Flow in Transformers, ACL 2020, arXiv 2005.00928: the attention of each
block, averaged over heads and mixed with the identity in equal parts, multiplied through all blocks. Only the rows
that the answer is read from are carried, from the last block to the first: O(N²) a block instead of O(N³).
"""

from typing import Any

import torch
from torch import Tensor

from vision_models.localization.sat import SAT


def row_of(row: Tensor, attention: Tensor) -> Tensor:
    """One block back: rows (B, N) times half the attention (B, H, N, N), averaged over heads, and half themselves."""
    return 0.5 * (torch.einsum("bn,bnm->bm", row, attention.mean(1)) + row)


def rollout(net: SAT, image: Tensor) -> Tensor:
    """Maps (B, y, x) of what reaches the patches, all of which the head of :class:`SAT` reads alike."""
    x, grid = net.tokens(image)
    attentions = []
    blocks: Any = net.blocks
    for block in blocks:
        attn: Any = block.attn
        q, k, _ = attn.qkv(block.norm1(x)).unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        attentions.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1))
        x, _ = block(x)
    row = x.new_zeros(x.shape[:2])
    row[:, 1:-1] = 1 / (grid[0] * grid[1])
    for attention in reversed(attentions):
        row = row_of(row, attention)
    return row[:, 1:-1].unflatten(1, grid)
