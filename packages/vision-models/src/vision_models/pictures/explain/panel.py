"""One panel of an explanation: brightness over the picture, or a matrix by itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor, nn

SHORT_SIDE = 256  # pixels that small pictures are enlarged to, so that cells of fine maps stay visible


@dataclass(frozen=True)
class Panel:
    """What one block shows.

    Attributes:
        title: one line.
        light: (Y, X) in [0, 1]: brightness of each token's part of the picture, or the entries of a matrix.
        cells: rows and columns of tokens between lines, or None.
        frames: (top, left, height, width) in tokens, drawn as rectangles; parts outside the map are cut.
        over: ``"picture"``, or ``"nothing"`` for a matrix.
    """

    title: str
    light: Float[Tensor, "Y X"]
    cells: tuple[int, int] | None = None
    frames: Sequence[tuple[int, int, int, int]] = ()
    over: Literal["picture", "nothing"] = "picture"


def brightness(values: Float[Tensor, "Y X"], dark: float = 0.15) -> Float[Tensor, "Y X"]:
    """Non-negative values as light: 0 stays visible as ``dark``, the largest is 1."""
    values = values.float().cpu().clamp(min=0)
    return dark + (1 - dark) * values / values.max().clamp(min=1e-12)


def token_at(point: tuple[float, float], size: tuple[int, int]) -> tuple[int, int]:
    """Row and column of the token that holds a point, given as fractions of height and width."""
    row, column = (min(int(fraction * side), side - 1) for fraction, side in zip(point, size, strict=True))
    return row, column


def inputs_of(net: nn.Module, modules: Sequence[nn.Module], image: Tensor) -> dict[nn.Module, Tensor]:
    """What each of ``modules`` is given for one image (C, Y, X), in the order of the forward pass."""
    seen: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen[module] = inputs[0]

    handles = [module.register_forward_pre_hook(keep) for module in modules]
    try:
        net(image[None])
    finally:
        for handle in handles:
            handle.remove()
    return seen


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of the numbers below ``count``, evenly spread, the last one among them."""
    shown = min(count, most)
    return [(i + 1) * count // shown - 1 for i in range(shown)]


def enlarged(picture: Image.Image) -> np.ndarray:
    """The picture (Y, X, 3) in whole repetitions of its pixels, at least ``SHORT_SIDE`` of them."""
    pixels = np.asarray(picture.convert("RGB"))
    times = -(-SHORT_SIDE // min(pixels.shape[:2]))
    return pixels.repeat(times, 0).repeat(times, 1)


def draw_panel(axis: Any, panel: Panel, pixels: np.ndarray) -> None:
    """Draw onto an axis of matplotlib; ``pixels`` (Y, X, 3) is the picture below."""
    axis.set_axis_on()
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(panel.title, fontsize=9, loc="left")
    if panel.over == "nothing":
        axis.imshow(panel.light.numpy(), cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
        return
    high, wide = pixels.shape[:2]
    rows, columns = panel.light.shape
    light = panel.light[torch.arange(high) * rows // high][:, torch.arange(wide) * columns // wide].numpy()[..., None]
    # Darkness falls on gray, so that black pictures show it too.
    axis.imshow(np.uint8(light * (0.75 * pixels + 64)), interpolation="nearest")
    if panel.cells is not None:
        for line in range(panel.cells[1], columns, panel.cells[1]):
            axis.axvline(line / columns * wide - 0.5, color="white", lw=0.4, alpha=0.5)
        for line in range(panel.cells[0], rows, panel.cells[0]):
            axis.axhline(line / rows * high - 0.5, color="white", lw=0.4, alpha=0.5)
    for color, (top, left, height, width) in zip(("#d6336c", "#f59f00"), panel.frames, strict=False):
        bottom, right = min(top + height, rows), min(left + width, columns)
        top, left = max(top, 0), max(left, 0)
        corner = (left / columns * wide - 0.5, top / rows * high - 0.5)
        size = ((right - left) / columns * wide, (bottom - top) / rows * high)
        axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=color, lw=2.2))
