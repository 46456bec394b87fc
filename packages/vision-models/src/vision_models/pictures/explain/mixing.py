"""What agent and InLine attention read in DeiT, PVT, Swin and CSwin: for the token at a point, whom it reads how much.

Agents: the attention of the agent that the token reads most, and what the token reads through all agents. InLine: the
token's weights where they are positive (they sum to one, some are negative), and the kernels made from the image.
"""

from typing import Any

import torch
from torch import Tensor, nn

from vision_models.layers.agent import AgentMixing
from vision_models.layers.inline import InLineMixing
from vision_models.pictures.explain.panel import Panel, brightness, spread, token_at


def panels(net: Any, image: Tensor, point: tuple[float, float]) -> list[list[Panel]]:
    """Two panels for the last such block of each stage, or for four blocks spread over a network without stages."""
    blocks: dict[nn.Module, str] = {}
    if hasattr(net, "stages"):
        for number, stage in enumerate(net.stages, start=1):
            found = [m for m in stage.modules() if isinstance(m, (AgentMixing, InLineMixing))]
            blocks |= dict.fromkeys(found[-1:], f"stage {number}")
    else:
        names = {m: f"block {i}" for i, block in enumerate(net.blocks, start=1) for m in block.modules()}
        found = [m for m in names if isinstance(m, (AgentMixing, InLineMixing))]
        blocks = {found[i]: names[found[i]] for i in (spread(len(found), 4) if found else [])}
    columns = []
    for module, inputs in _inputs(net, list(blocks), image).items():
        shown = _agents if isinstance(module, AgentMixing) else _weights
        columns.append(shown(module, inputs, point, blocks[module]))  # pyright: ignore[reportArgumentType]
    return columns


def agent_weights(mixing: AgentMixing, q: Tensor, k: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """How agents collect (H, A, N) and how tokens read from them (H, N, A), for one image."""
    patches = q[:, q.shape[1] - grid[0] * grid[1] :].mT.unflatten(2, grid)
    pooled = torch.nn.functional.adaptive_avg_pool2d(patches, mixing.shape).flatten(2).mT
    agent_bias, query_bias = mixing.biases(grid)
    a, q, k = (x[0].unflatten(1, (mixing.num_heads, -1)).transpose(0, 1) for x in (pooled, q, k))
    scale = q.shape[2] ** -0.5
    return (scale * a @ k.mT + agent_bias[0]).softmax(-1), (scale * q @ a.mT + query_bias[0]).softmax(-1)


def inline_weights(mixing: InLineMixing, q: Tensor, k: Tensor, token: int) -> Tensor:
    """The weights of one token (H, N), which sum to one."""
    q, k = (x[0].unflatten(1, (mixing.num_heads, -1)).transpose(0, 1) for x in (q, k))
    scores = q.shape[2] ** -0.5 * torch.einsum("hd,hnd->hn", q[:, token], k) / k.shape[1]
    return scores - scores.mean(1, keepdim=True) + 1 / k.shape[1]


def _agents(mixing: AgentMixing, inputs: tuple[Any, ...], point: tuple[float, float], name: str) -> list[Panel]:
    q, k, _, _, grid = inputs
    row, column = token_at(point, grid)
    before = q.shape[1] - grid[0] * grid[1]
    collect, read = agent_weights(mixing, q, k, grid)
    read = read[:, before + row * grid[1] + column]
    agent = int(read.mean(0).argmax())
    through = torch.einsum("ha,han->n", read, collect)
    place = f"{agent // mixing.shape[1] + 1}, {agent % mixing.shape[1] + 1}"
    return [
        Panel(
            f"{name}: its agent ({place}) of {mixing.shape[0]}×{mixing.shape[1]}",
            brightness(collect[:, agent, before:].mean(0).view(grid)),
            frames=[(row, column, 1, 1)],
        ),
        Panel(
            f"{name}: read through all agents", brightness(through[before:].view(grid)), frames=[(row, column, 1, 1)]
        ),
    ]


def _weights(mixing: InLineMixing, inputs: tuple[Any, ...], point: tuple[float, float], name: str) -> list[Panel]:
    q, k, _, source, grid = inputs
    row, column = token_at(point, grid)
    before = q.shape[1] - grid[0] * grid[1]
    weights = inline_weights(mixing, q, k, before + row * grid[1] + column).mean(0)
    kernel = mixing.kernels(source)[0].abs().mean((0, 1))
    return [
        Panel(f"{name}: positive weights", brightness(weights[before:].view(grid)), frames=[(row, column, 1, 1)]),
        Panel(f"{name}: kernels of this image, mean size", brightness(kernel, dark=0), over="nothing"),
    ]


def _inputs(net: nn.Module, modules: list[nn.Module], image: Tensor) -> dict[nn.Module, tuple[Any, ...]]:
    """All arguments that each of ``modules`` is given for one image (C, Y, X), in the order of the forward pass."""
    seen: dict[nn.Module, tuple[Any, ...]] = {}
    handles = [module.register_forward_pre_hook(lambda m, args: seen.update({m: args})) for module in modules]
    try:
        net(image[None])
    finally:
        for handle in handles:
            handle.remove()
    return seen
