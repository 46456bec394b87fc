"""Paths over shelves: numbered fixations, the target framed. Checked in: ``pictures/test_scanpath.py``."""

from collections.abc import Sequence

from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as F

from detection.pictures.boxes import GAP
from detection.pictures.fonts import writable
from detection.scanpaths.shelves import Shelf

LONG_SIDE = 1000  # pixels: smaller shelves are enlarged by a whole number
TARGET, PATH, TRUTH = "#2f9e44", "#e03131", "#1971c2"


def draw_path(shelf: Shelf, path: Sequence[int], *, color: str = PATH) -> Image.Image:
    """The shelf, its target framed in green, and a line over the objects in the order of the path.

    Fixations are numbered from 1; where an object is looked at again, the numbers stand side by side.
    """
    picture = F.to_pil_image(shelf.picture)
    factor = max(1, LONG_SIDE // max(picture.size))
    picture = picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    boxes = (shelf.boxes * factor).tolist()
    width = max(2, round(max(picture.size) / 300))
    x0, y0, x1, y1 = boxes[shelf.target]
    pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=TARGET, width=2 * width)
    size = max(10, round(min(min(b[2] - b[0], b[3] - b[1]) for b in boxes) / 5))
    points = [((boxes[p][0] + boxes[p][2]) / 2, (boxes[p][1] + boxes[p][3]) / 2) for p in path]
    if len(points) > 1:
        pen.line(points, fill=color, width=width, joint="curve")
    numbers: dict[int, list[int]] = {}
    for step, place in enumerate(path, 1):
        numbers.setdefault(place, []).append(step)
    for place, steps in numbers.items():
        x, y = (boxes[place][0] + boxes[place][2]) / 2, (boxes[place][1] + boxes[place][3]) / 2
        shown, font = writable(", ".join(map(str, steps)), size)
        half = max(size, font.getlength(shown) / 2 + size / 2)
        pen.rounded_rectangle((x - half, y - size, x + half, y + size), radius=size, fill=color)
        pen.text((x, y), shown, fill="white", font=font, anchor="mm")
    return picture


def stacked(pictures: Sequence[Image.Image], titles: Sequence[str]) -> Image.Image:
    """Pictures below each other, a title above each."""
    heads = [writable(title, 15) for title in titles]
    width = max(picture.width for picture in pictures)
    width = max(width, *(round(font.getlength(shown)) for shown, font in heads)) + 2 * GAP
    page = Image.new("RGB", (width, sum(24 + picture.height + GAP for picture in pictures) + GAP), "white")
    pen, y = ImageDraw.Draw(page), GAP
    for picture, (shown, font) in zip(pictures, heads, strict=True):
        pen.text((GAP, y), shown, fill="black", font=font)
        page.paste(picture, (GAP, y + 22))
        y += 24 + picture.height + GAP
    return page
