"""Pictures of heat maps: the map over the picture, a color bar, the word; strips of one map per word."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, ImageDraw
from torch import Tensor

from vlm_tools.pictures.fonts import writable

# Viridis at nine even places (S. van der Walt and N. Smith, CC0).
_COLORS = np.array(
    [(68, 1, 84), (71, 45, 123), (59, 82, 139), (44, 114, 142), (33, 145, 140), (40, 174, 128), (94, 201, 98),
     (173, 220, 48), (253, 231, 37)],
    dtype=float,
)  # fmt: skip
PAGE = 1100  # pixels that a report may be wide
_BAR, _GAP, _LABEL, _TEXT, _LINE = 12, 6, 58, 13, 20  # pixels


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
    side: int = 260,
) -> Image.Image:
    """The map over the picture, a color bar with its limits to the right, the caption below.

    Args:
        picture: of the map's size.
        caption: in any script; what does not fit in a line is cut off.
        side: pixels of the longer side. Small pictures are enlarged by a whole number, without smoothing.

    Raises:
        ValueError: sizes differ, opacity outside [0, 1].
    """
    if picture.size != (heat.shape[1], heat.shape[0]):
        raise ValueError(
            f"overlay: picture is {picture.size[0]}×{picture.size[1]}, the map {heat.shape[1]}×{heat.shape[0]}"
        )
    if not 0 <= opacity <= 1:
        raise ValueError(f"overlay: opacity must lie in [0, 1], got opacity={opacity}")
    low, high = common_limits(heat) if limits is None else limits
    blended = _fitted(Image.blend(picture.convert("RGB"), colored(heat, limits=(low, high)), opacity), side)
    width, height = max(blended.width, 4 * _TEXT), max(blended.height, 2 * _LINE)
    canvas = Image.new("RGB", (width + _GAP + _BAR + _LABEL, height + _LINE), "white")
    canvas.paste(blended, (0, 0))
    bar = colored(torch.linspace(1, 0, height)[:, None].expand(-1, _BAR), limits=(0, 1))
    canvas.paste(bar, (width + _GAP, 0))
    draw = ImageDraw.Draw(canvas)
    for value, top in ((high, 0), (low, height - _TEXT - 4)):
        draw.text((width + 2 * _GAP + _BAR, top), f"{value:.2g}", fill="black", font=writable("", _TEXT)[1])
    _write(draw, caption, (3, height + 2), canvas.width - 6)
    return canvas


def _fitted(image: Image.Image, side: int) -> Image.Image:
    """The picture with a longer side of about ``side`` pixels."""
    longest = max(image.size)
    if longest <= side:
        times = side // longest
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    width, height = (max(1, round(length * side / longest)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BOX)


def _write(draw: ImageDraw.ImageDraw, text: str, place: tuple[int, int], room: int) -> None:
    """One line of text, cut off with an ellipsis where the room ends."""
    shown, font = writable(text, _TEXT)
    if draw.textlength(shown, font) > room:
        while shown and draw.textlength(f"{shown}…", font) > room:
            shown = shown[:-1]
        shown = f"{shown}…"
    draw.text(place, shown, fill="black", font=font)


def strip(pictures: Sequence[Image.Image], *, columns: int | None = None) -> Image.Image:
    """Pictures of equal size in rows.

    Args:
        columns: pictures in a row; None: as many as a page of 1,100 pixels holds.

    Raises:
        ValueError: no picture.
    """
    if not pictures:
        raise ValueError("strip: there is no picture")
    width, height = pictures[0].size
    columns = min(columns or max(1, PAGE // width), len(pictures))
    rows = -(-len(pictures) // columns)
    canvas = Image.new("RGB", (columns * width, rows * height), "white")
    for number, picture in enumerate(pictures):
        canvas.paste(picture, (number % columns * width, number // columns * height))
    return canvas


def shrunk(picture: Image.Image, side: int = 768) -> Image.Image:
    """A copy whose longer side is at most ``side``: maps over it cost what can be seen of them."""
    copy = picture.copy()
    copy.thumbnail((side, side))
    return copy
