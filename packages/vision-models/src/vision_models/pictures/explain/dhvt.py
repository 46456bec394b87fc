"""What DHVT's attention reads: a patch, the heads' tokens, and how much of each head goes to each head's token."""

from typing import Any

from torch import Tensor

from vision_models.models.dhvt import DHVT, HeadTokenAttention
from vision_models.pictures.explain.panel import Panel, brightness, inputs_of, spread, token_at


def panels(net: DHVT, image: Tensor, point: tuple[float, float]) -> list[list[Panel]]:
    """For up to four blocks: attention of the patch at the point and of the head tokens, means over heads."""
    grid = net.tokens(image[None])[1]
    names: dict[Any, str] = {block.attn: f"block {i}" for i, block in enumerate(net.blocks, start=1)}
    chosen = [list(names)[i] for i in spread(len(names), 4)]
    return [_column(attn, x, grid, point, names[attn]) for attn, x in inputs_of(net, chosen, image).items()]


def attention_of(attn: HeadTokenAttention, x: Tensor) -> Tensor:
    """(heads, N, N) for tokens (1, 1 + patches, C); N with the head tokens, which come last."""
    tokens = attn.with_head_tokens(x) if attn.head_tokens else x
    q, k, _ = attn.qkv(tokens)[0].unflatten(1, (3, attn.num_heads, -1)).permute(1, 2, 0, 3).unbind(0)
    return (q @ k.mT * q.shape[2] ** -0.5).softmax(2)


def _column(attn: Any, x: Tensor, grid: tuple[int, int], point: tuple[float, float], name: str) -> list[Panel]:
    row, column = token_at(point, grid)
    seen, last = attention_of(attn, x), x.shape[1]
    here = 1 + row * grid[1] + column

    def on_patches(weights: Tensor) -> Tensor:
        return brightness(weights[1:last].view(grid))

    frames = [(row, column, 1, 1)]
    if not attn.head_tokens:
        first = Panel(f"{name}: class token", on_patches(seen[:, 0].mean(0)))
        return [Panel(f"{name}: patch", on_patches(seen[:, here].mean(0)), frames=frames), first]
    share = 100 * float(seen[:, here, last:].sum(1).mean())
    to_heads = seen[:, here, last:]
    return [
        Panel(f"{name}: patch, {share:.0f} % to head tokens", on_patches(seen[:, here].mean(0)), frames=frames),
        Panel(f"{name}: head tokens", on_patches(seen[:, last:].mean((0, 1)))),
        Panel(
            f"{name}: heads (rows) to head tokens",
            to_heads.float().cpu() / to_heads.max().clamp(min=1e-12).cpu(),
            over="nothing",
        ),
    ]
