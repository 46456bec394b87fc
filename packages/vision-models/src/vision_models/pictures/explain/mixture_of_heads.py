"""Which tokens take which heads: the gates of a mixture of heads, in DeiT and TransNeXt."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attn_core.nn import HeadRouter
from vision_models.pictures.explain.panel import Panel, brightness, token_at

ROWS = 4  # heads shown of a block


def routed_panels(
    net: nn.Module,
    blocks: Mapping[nn.Module, str],
    image: Tensor,
    grids: Mapping[nn.Module, tuple[int, int]],
    point: tuple[float, float],
) -> list[list[Panel]]:
    """A column for each router: the gates of the routed heads that are taken most, bright where a token takes them.

    Args:
        blocks: routers and what their titles say of them.
        grids: rows and columns of the tokens of each; what stands before them, a class token, is left out.
    """
    columns = []
    for router, gates in gates_of(net, list(blocks), image).items():
        grid = grids[router]
        maps = gates[gates.shape[0] - grid[0] * grid[1] :].T.unflatten(1, grid).float().cpu()
        row, column = token_at(point, grid)
        first = router.num_shared if router.num_routed else 0
        shares = (maps[first:] > 0).float().mean((1, 2))
        weight = shares if router.num_routed else maps.mean((1, 2))
        chosen = sorted(weight.topk(min(ROWS, len(weight))).indices.tolist())
        panels = []
        for head in chosen:
            said = f"{100 * shares[head]:.0f} % of tokens" if router.num_routed else "always on"
            title = f"{blocks[router]}: head {first + head + 1}, {said}"
            panels.append(Panel(title, brightness(maps[first + head]), (1, 1), [(row, column, 1, 1)]))
        columns.append(panels)
    return columns


@torch.no_grad()
def gates_of(net: nn.Module, routers: list[nn.Module], image: Tensor) -> dict[Any, Tensor]:
    """The gates (N, heads) of each of ``routers`` for one image (C, Y, X), in the order of the forward pass."""
    seen: dict[Any, Tensor] = {}
    handles = [r.register_forward_hook(lambda r, _, result: seen.update({r: result.gates[0]})) for r in routers]
    try:
        net(image[None])
    finally:
        for handle in handles:
            handle.remove()
    return seen


def routers_by_name(blocks: Any, names: list[str]) -> dict[HeadRouter, str]:
    """The routers in ``blocks``, each under the name of its block."""
    return {
        module: name
        for name, block in zip(names, blocks, strict=True)
        for module in block.modules()
        if isinstance(module, HeadRouter)
    }
