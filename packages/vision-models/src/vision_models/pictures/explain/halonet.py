"""What the last halo attention of each HaloNet stage reads: the block that holds a token, and the window around it."""

from typing import Any

import torch
from torch import Tensor

from vision_models.layers.halo_attention import HaloAttention, offset_logits
from vision_models.models.halonet import HaloNet
from vision_models.pictures.explain.panel import Panel, brightness, inputs_of, token_at


def panels(net: HaloNet, image: Tensor, point: tuple[float, float]) -> list[list[Panel]]:
    """Per stage with halo attention: the token's attention, its block (first frame) and the halo window (second)."""
    chosen: dict[Any, int] = {}
    for number, stage in enumerate(net.stages, start=1):
        last = [module for module in stage.modules() if isinstance(module, HaloAttention)][-1:]
        chosen.update(dict.fromkeys(last, number))
    return [[_panel(m, x, point, chosen[m])] for m, x in inputs_of(net, list(chosen), image).items()]  # pyright: ignore[reportArgumentType]


def window_attention(attn: HaloAttention, x: Tensor, point: tuple[float, float]) -> tuple[Tensor, tuple[int, int]]:
    """Attention of the query at a point, mean over heads, as (window, window), and the window's first row and column.

    Entries outside the map are what the border takes (0 with ``border="masked"``). x: (1, C, Y, X).
    """
    q, kv = attn.project(x)
    height, width, span = x.shape[2], x.shape[3], attn.block + 2 * attn.halo
    side = attn.block // attn.query_stride
    row, column = token_at(point, (q.shape[1], q.shape[2]))
    top, left = row // side * attn.block - attn.halo, column // side * attn.block - attn.halo
    queries = q.permute(0, 3, 1, 2, 4)
    by_row = offset_logits(queries, attn.height_rel, side, span, 2)[0].unflatten(1, (q.shape[1], -1))[:, row, column]
    by_column = offset_logits(queries, attn.width_rel, side, span, 3)[0].unflatten(1, (q.shape[1], -1))[:, row, column]
    rows, columns = torch.arange(top, top + span), torch.arange(left, left + span)
    inside = ((rows >= 0) & (rows < height))[:, None] & ((columns >= 0) & (columns < width))
    keys = kv[0, rows.clamp(0, height - 1)][:, columns.clamp(0, width - 1), :, : attn.head_dim]
    keys = keys * inside[..., None, None].to(keys)
    logits = torch.einsum("hd,yxhd->hyx", q[0, row, column], keys) * attn.head_dim**-0.5
    logits = logits + by_row[:, :, None] + by_column[:, None, :]
    if attn.masked:
        logits = logits.masked_fill(~inside.to(logits.device), -torch.inf)
    return logits.flatten(1).softmax(-1).mean(0).view(span, span), (top, left)


def _panel(attn: HaloAttention, x: Tensor, point: tuple[float, float], number: int) -> Panel:
    attention, (top, left) = window_attention(attn, x, point)
    height, width, span = x.shape[2], x.shape[3], attn.block + 2 * attn.halo
    light = torch.zeros(height, width)
    rows, columns = slice(max(top, 0), min(top + span, height)), slice(max(left, 0), min(left + span, width))
    seen = attention[rows.start - top : rows.stop - top, columns.start - left : columns.stop - left].float().cpu()
    light[rows, columns] = seen
    title = f"stage {number}: block {attn.block}, halo {attn.halo}, {100 * abs(float(1 - seen.sum())):.0f} % outside"
    block = (top + attn.halo, left + attn.halo, attn.block, attn.block)
    return Panel(title, brightness(light), (attn.block, attn.block), [block, (top, left, span, span)])
