"""Boxes drawn into pictures, and sheets of truth beside prediction. Checked in: ``pictures/test_boxes.py``."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from detection.pictures.fonts import writable

COLORS = ("#e03131", "#1971c2", "#2f9e44", "#f08c00", "#9c36b5", "#0c8599", "#e8590c", "#6741d9", "#c2255c", "#66a80f")
SMALL = 384  # pixels: pictures whose long side is shorter are enlarged, so that the texts can be read
CELL = (540, 420)  # width and height of a picture on a sheet; two and their gaps are 1,100 wide
GAP = 6


@dataclass(frozen=True)
class Boxes:
    """Boxes of a picture: (N, 4) xyxy in its pixels, labels and texts."""

    boxes: Tensor
    labels: Sequence[int]
    texts: Sequence[str]


def draw(pixels: Tensor, found: Boxes) -> Image.Image:
    """A picture (3, Y, X) uint8 with boxes, in its own size or, if it is small, a multiple of it."""
    factor = max(1, round(SMALL / max(pixels.shape[-2:])))
    image = F.to_pil_image(pixels)
    return drawn(image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST), found, factor)


def drawn(image: Image.Image, found: Boxes, factor: float) -> Image.Image:
    """An RGB image with boxes that are multiplied by ``factor``; lines are 2 pixels wide or 1/300 of the long side."""
    pen = ImageDraw.Draw(image)
    width = max(2, round(max(image.size) / 300))
    size = max(12, round(max(image.size) / 55))
    places = []
    for box, label in zip((found.boxes * factor).tolist(), found.labels, strict=True):
        x0, y0, x1, y1 = box
        pen.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=COLORS[label % len(COLORS)], width=width)
        places.append((x0, y0, y1))
    for (x0, y0, y1), label, text in zip(places, found.labels, found.texts, strict=True):
        shown, font = writable(text, size)
        left, top, right, bottom = font.getbbox(shown)
        wide, high = right - left + 6, bottom - top + 4
        x = min(max(0.0, x0), max(0.0, image.width - wide))
        y = y0 - high if y0 >= high else min(y1, image.height - high)  # above the box, else below it
        pen.rectangle((x, y, x + wide, y + high), fill=COLORS[label % len(COLORS)])
        pen.text((x + 3 - left, y + 2 - top), shown, fill="white", font=font)
    return image


def beside(left: Image.Image, right: Image.Image) -> Image.Image:
    """Two pictures in one, with a gap."""
    page = Image.new("RGB", (left.width + GAP + right.width, max(left.height, right.height)), "white")
    page.paste(left, (0, 0))
    page.paste(right, (left.width + GAP, 0))
    return page


def as_picture(enhanced: Tensor, size: Sequence[int]) -> Tensor:
    """What a detector sees in place of a picture, (3, y, x) around [0, 1] → (3, Y, X) uint8 of ``size``, cut off."""
    shown = enhanced.detach().float().cpu().clamp(0, 1)
    return F.resize((shown * 255).round().to(torch.uint8), list(size), antialias=True)


def sheet(
    rows: Sequence[tuple[Tensor, Boxes, Boxes] | tuple[Tensor, Boxes, Boxes, Tensor]],
    titles: Sequence[tuple[str, str]],
) -> Image.Image:
    """Pictures (3, Y, X) uint8, one in a row: truth on the left, prediction on the right, a title above each.

    A fourth part of a row is the picture on the right, where that is another one of the same size.

    Pictures that are larger than a cell are reduced to it, small ones enlarged by a whole number; boxes are drawn
    afterwards, so that their lines are equally wide in all.
    """
    cells = []
    for pixels, truth, found, *seen in rows:
        image, right = F.to_pil_image(pixels), F.to_pil_image(seen[0] if seen else pixels)
        factor = min(CELL[0] / image.width, CELL[1] / image.height)
        factor = float(int(factor)) if factor >= 1 else factor
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        kind = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
        cells.append((drawn(image.resize(size, kind), truth, factor), drawn(right.resize(size, kind), found, factor)))
    wide = max(cell.width for pair in cells for cell in pair)
    heads = [[writable(title, 15) for title in pair] for pair in titles]
    wide = max(wide, *(round(font.getlength(shown)) + 4 for pair in heads for shown, font in pair))
    high = sum(24 + pair[0].height + GAP for pair in cells)
    page = Image.new("RGB", (2 * wide + 3 * GAP, high + GAP), "white")
    pen, y = ImageDraw.Draw(page), GAP
    for pair, head in zip(cells, heads, strict=True):
        for column, (cell, (shown, font)) in enumerate(zip(pair, head, strict=True)):
            x = GAP + column * (wide + GAP)
            pen.text((x, y), shown, fill="black", font=font)
            page.paste(cell, (x, y + 22))
        y += 24 + pair[0].height + GAP
    return page
