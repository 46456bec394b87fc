"""Which keys a query of Sparsifiner keeps, and how much of the attention to all keys they hold."""

import math
from typing import Any

import torch
from torch import Tensor

from vision_models.models.sparsifiner import Sparsifiner, kept_keys
from vision_models.pictures.explain.panel import Panel, brightness, inputs_of, spread, token_at

HEADS = 3  # shown of a block


def panels(net: Sparsifiner, image: Tensor, point: tuple[float, float]) -> list[list[Panel]]:
    """At most four blocks: for some of their heads the keys that the patch at the point keeps, brighter is more."""
    grid = (image.shape[1] // net.min_side, image.shape[2] // net.min_side)
    blocks: dict[Any, int] = {net.blocks[i].attn: i + 1 for i in spread(len(net.blocks), 4)}
    row, column = token_at(point, grid)
    columns = []
    for attn, x in inputs_of(net, list(blocks), image).items():
        weights, kept = kept_attention(attn, x, grid, row * grid[1] + column)
        column_panels = []
        for head in spread(attn.num_heads, HEADS):  # pyright: ignore[reportArgumentType]
            held = 100 * float(weights[head][kept[head]].sum())
            light = torch.where(kept[head], brightness(weights[head][None], dark=0.4)[0], 0.0)[1:].unflatten(0, grid)
            title = f"block {blocks[attn]}, head {head + 1}: {int(kept[head].sum())} keys hold {held:.0f} %"
            column_panels.append(Panel(title, light, (1, 1), [(row, column, 1, 1)]))
        columns.append(column_panels)
    return columns


@torch.no_grad()
def kept_attention(attn: Any, x: Tensor, grid: tuple[int, int], patch: int) -> tuple[Tensor, Tensor]:
    """Attention of a patch to all keys (heads, 1 + N), and which it keeps; x (1, 1 + N, C)."""
    q, k, _ = attn.projected(x)
    weights = (q[0, :, 1 + patch, None] @ k[0].mT * q.shape[3] ** -0.5).softmax(2)[:, 0].float().cpu()
    count = math.ceil(attn.keep * q.shape[2])
    if count >= q.shape[2]:
        return weights, torch.ones_like(weights, dtype=torch.bool)
    predictor = attn.mask_predictor
    own = predictor.coefficients(q, k, grid)[:, :, patch : patch + 1]
    kept = kept_keys(own, predictor.bases(grid), count)[0, :, 0].cpu()
    return weights, torch.zeros_like(weights, dtype=torch.bool).scatter(1, kept, True)
