"""What the last two blocks of each NAT stage read: the window around a token, dilated in one of them."""

from typing import Any

import torch
from torch import Tensor

from vision_models.layers.neighborhood import NeighborhoodAttention
from vision_models.models.nat import NAT, MapAttention
from vision_models.pictures.explain.panel import Panel, brightness, inputs_of, token_at

# Any: timm's decorator of both classes hides their attributes from type checkers.
WINDOW: Any = NeighborhoodAttention
WHOLE: Any = MapAttention


def panels(net: NAT, image: Tensor, point: tuple[float, float]) -> list[list[Panel]]:
    """Per stage the attention of the token at the point, mean over heads, in its last blocks."""
    chosen: dict[Any, int] = {}
    for number, stage in enumerate(net.stages, start=1):
        found = [module for module in stage.modules() if isinstance(module, (WINDOW, WHOLE))]
        chosen.update(dict.fromkeys(found[-2:], number))
    columns: dict[int, list[Panel]] = {}
    for module, x in inputs_of(net, list(chosen), image).items():
        columns.setdefault(chosen[module], []).append(_panel(module, x, point, chosen[module]))
    return list(columns.values())


def token_attention(attn: Any, x: Tensor, row: int, column: int) -> Tensor:
    """Attention (Y', X') of one token of the map (1, Y, X, C), mean over heads; Y', X' with the padding it sees."""
    if isinstance(attn, WINDOW):
        q, k, _ = attn.projected(x)
        logits = torch.einsum("hd,hyxd->hyx", q[0, :, row, column], k[0]) * q.shape[4] ** -0.5
        down, right = (_apart(place, side, attn) for place, side in ((row, k.shape[2]), (column, k.shape[3])))
        middle = attn.kernel_size - 1
        bias = attn.rpb[:, (down.clamp(-middle, middle) + middle)[:, None], right.clamp(-middle, middle) + middle]
        hidden = (down.abs() > middle)[:, None] | (right.abs() > middle)[None]
        logits = (logits + bias).masked_fill(hidden, -torch.inf)
    else:
        height, width = x.shape[1:3]
        q, k, _ = attn.qkv(x).flatten(1, 2).unflatten(2, (3, attn.num_heads, -1)).unbind(2)
        place = row * width + column
        logits = torch.einsum("hd,nhd->hn", q[0, place], k[0]) * q.shape[3] ** -0.5
        logits = (logits + attn.bias(height, width)[:, place]).unflatten(1, (height, width))
    return logits.flatten(1).softmax(1).mean(0).view(logits.shape[1:])


def _apart(place: int, side: int, attn: Any) -> Tensor:
    """Steps of the dilation from ``place`` to each cell of an axis; kernel_size where the window does not hold it."""
    mine = torch.arange(place % attn.dilation, side, attn.dilation)
    own = place // attn.dilation
    first = min(max(own - attn.kernel_size // 2, 0), len(mine) - attn.kernel_size)
    apart = torch.full((side,), attn.kernel_size)
    apart[mine[first : first + attn.kernel_size]] = torch.arange(first, first + attn.kernel_size) - own
    return apart.to(attn.rpb.device)


def _panel(attn: Any, x: Tensor, point: tuple[float, float], number: int) -> Panel:
    height, width = x.shape[1], x.shape[2]
    row, column = token_at(point, (height, width))
    seen = token_attention(attn, x, row, column)[:height, :width].float().cpu()
    outside = 100 * abs(float(1 - seen.sum()))
    if isinstance(attn, WHOLE):
        return Panel(f"stage {number}: the whole map", brightness(seen), (1, 1), [(row, column, 1, 1)])
    title = f"stage {number}: {attn.kernel_size}×{attn.kernel_size}, dilation {attn.dilation}"
    title += f", {outside:.0f} % outside" if outside >= 0.5 else ""
    return Panel(title, brightness(seen), (1, 1), [(row, column, 1, 1)])
