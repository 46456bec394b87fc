"""What blocks of SpectFormer and GFNet read: frequencies that gates let through, the taps of a token; attention.

A gate's spectrum has the constant wave in its middle, the shortest waves at its edges. The same gate is a convolution
around the edges of the map; its taps are laid around the token at the point.
"""

from typing import Any

import torch
from torch import Tensor

from vision_models.backbone import StagedBackbone
from vision_models.layers.spectral_gate import SpectralGate, kernel_of
from vision_models.models.spectformer import Attention, SplitAttention, heads_of
from vision_models.pictures.explain.panel import Panel, brightness, inputs_of, spread, token_at

# Any: timm's decorator of the class hides its attributes from type checkers.
GATE: Any = SpectralGate
# Above this many tokens a side, lines between frequencies would hide them.
FINE = 16


def panels(net: StagedBackbone, image: Tensor, point: tuple[float, float]) -> list[list[Panel]]:
    """Of the last block of at most four stages: spectrum and taps of its gate, or attention of the token."""
    stages: list[Any] = list(net.stages)
    chosen: dict[Any, int] = {}
    for i in spread(len(stages), 4):
        found = [m for m in stages[i].modules() if isinstance(m, (GATE, Attention, SplitAttention))]
        chosen[found[-1]] = i + 1
    isotropic = len({info["reduction"] for info in net.feature_info}) == 1
    name = "block" if isotropic else "stage"
    return [_column(m, x, point, f"{name} {chosen[m]}") for m, x in inputs_of(net, list(chosen), image).items()]  # pyright: ignore[reportArgumentType]


def taps_around(gate: Any, row: int, column: int, grid: tuple[int, int]) -> Tensor:
    """What a token takes of each token of the map ``grid``, (Y, X, C): the gradient of its output by its input."""
    taps = kernel_of(gate.gate(grid), grid)
    down, right = ((place - torch.arange(side) + side // 2) % side
                   for place, side in ((row, grid[0]), (column, grid[1])))  # fmt: skip
    return taps[down][:, right]


def token_attention(attn: Any, x: Tensor, row: int, column: int) -> Tensor:
    """Attention (Y, X) of one token of the map (1, Y, X, C), mean over heads."""
    q, k, _ = attn.projected(x)
    q, k = (heads_of(tokens, attn.num_heads)[0] for tokens in (q, k))
    logits = torch.einsum("hd,hnd->hn", q[:, row * x.shape[2] + column], k) * q.shape[2] ** -0.5
    return logits.softmax(1).mean(0).view(x.shape[1:3])


def _column(module: Any, x: Tensor, point: tuple[float, float], name: str) -> list[Panel]:
    grid = (x.shape[1], x.shape[2])
    row, column = token_at(point, grid)
    token = [(row, column, 1, 1)]
    if not isinstance(module, GATE):
        cells = (1, 1) if max(grid) <= FINE else None
        light = brightness(token_attention(module, x, row, column))
        return [Panel(f"{name}: attention of the token", light, cells, token)]
    spectrum = torch.fft.fft2(kernel_of(module.gate(grid), grid), dim=(0, 1)).abs().mean(2)
    waves = brightness(torch.fft.fftshift(spectrum), dark=0)
    taps = brightness(taps_around(module, row, column, grid).norm(dim=2))
    return [
        Panel(f"{name}: mean |gate|, {grid[0]}×{grid[1]} waves", waves, over="nothing"),
        Panel(f"{name}: taps of the token", taps, None, token),
    ]
