"""Pictures of heat maps: the map over the picture, a color bar, the word; strips of one map per word."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

# Viridis at nine even places (S. van der Walt and N. Smith, CC0).
_COLORS = np.array(
    [(68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140), (40, 174, 128), (94, 201, 98),
     (173, 220, 48), (253, 231, 37)],
    dtype=float,
)  # fmt: skip
_BAR, _TEXT = 12, 14


def colored(heat: Float[Tensor, "Y X"], *, limits: tuple[float, float] | None = None) -> Image.Image:
    """The map in perceptually even colors; ``limits`` are the values of the darkest and the brightest one.

    Raises:
        ValueError: limits that are not increasing.
    """
    values = heat.detach().float().cpu().numpy()
    low, high = (float(values.min()), float(values.max())) if limits is None else limits
    if limits is not None and not high > low:
        raise ValueError(f"colored: limits must increase, got limits={limits}")
    place = np.clip((values - low) / max(high - low, 1e-12), 0, 1) * (len(_COLORS) - 1)
    channels = [np.interp(place, np.arange(len(_COLORS)), _COLORS[:, channel]) for channel in range(3)]
    return Image.fromarray(np.stack(channels, -1).round().astype(np.uint8))


def common_limits(*maps: Tensor) -> tuple[float, float]:
    """Least and largest value of several maps, apart even if all are constant."""
    low, high = min(float(m.min()) for m in maps), max(float(m.max()) for m in maps)
    return low, high if high > low else low + 1e-6


def overlay(
    picture: Image.Image,
    heat: Float[Tensor, "Y X"],
    caption: str,
    *,
    limits: tuple[float, float] | None = None,
    opacity: float = 0.6,
    least: int = 224,
) -> Image.Image:
    """The map over the picture, a color bar with its limits to the right, the caption below.

    Args:
        picture: of the map's size.
        least: shorter side of the result; small pictures are enlarged without smoothing.

    Raises:
        ValueError: sizes differ, opacity outside [0, 1].
    """
    if picture.size != (heat.shape[1], heat.shape[0]):
        raise ValueError(
            f"overlay: picture is {picture.size[0]}×{picture.size[1]}, the map {heat.shape[1]}×{heat.shape[0]}"
        )
    if not 0 <= opacity <= 1:
        raise ValueError(f"overlay: opacity must lie in [0, 1], got opacity={opacity}")
    low, high = (float(heat.min()), float(heat.max())) if limits is None else limits
    blended = Image.blend(picture.convert("RGB"), colored(heat, limits=limits), opacity)
    times = max(1, -(-least // min(picture.size)))
    width, height = picture.size[0] * times, picture.size[1] * times
    canvas = Image.new("RGB", (width + 70, height + _TEXT + 6), "white")
    canvas.paste(blended.resize((width, height), Image.Resampling.NEAREST), (0, 0))
    bar = colored(torch.linspace(1, 0, height)[:, None].expand(-1, _BAR), limits=(0, 1))
    canvas.paste(bar, (width + 6, 0))
    draw = ImageDraw.Draw(canvas)
    draw.text((width + 9 + _BAR, 0), f"{high:.3g}", fill="black")
    draw.text((width + 9 + _BAR, height - _TEXT), f"{low:.3g}", fill="black")
    draw.text((3, height + 3), caption.encode("latin-1", "replace").decode("latin-1"), fill="black")
    return canvas


def strip(pictures: Sequence[Image.Image], *, columns: int = 6) -> Image.Image:
    """Pictures of equal size in rows.

    Raises:
        ValueError: no picture.
    """
    if not pictures:
        raise ValueError("strip: there is no picture")
    width, height = pictures[0].size
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * width, rows * height), "white")
    for number, picture in enumerate(pictures):
        canvas.paste(picture, (number % columns * width, number // columns * height))
    return canvas
