"""Paths over shelves: numbered fixations, the target framed. Checked in: ``pictures/test_scanpath.py``."""

from collections.abc import Callable, Sequence

from PIL import Image, ImageDraw
from torchvision.transforms.v2 import functional as F

from detection.pictures.boxes import GAP
from detection.pictures.fonts import writable
from detection.scanpaths.shelves import Shelf

LONG_SIDE = 1000  # pixels: smaller shelves are enlarged by a whole number
FIXATIONS = ("fixation", "fixations")
TARGET, PATH, TRUTH = "#2f9e44", "#e03131", "#1971c2"


def draw_path(shelf: Shelf, path: Sequence[int], *, color: str = PATH) -> Image.Image:
    """The shelf, its target framed in green, and a line over the objects in the order of the path.

    Fixations are numbered from 1; where an object is looked at again, its numbers stand on it, runs as "4–7", in
    as many lines as its width needs.
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
        _, font = writable("0123456789, –", size)
        lines = wrapped(runs(steps), font.getlength, boxes[place][2] - boxes[place][0] - size)
        half = max(size, max(map(font.getlength, lines)) / 2 + size / 2)
        high = size * (1 + 0.6 * (len(lines) - 1))
        pen.rounded_rectangle((x - half, y - high, x + half, y + high), radius=size, fill=color)
        for number, line in enumerate(lines):
            at = y + 1.2 * size * (number - (len(lines) - 1) / 2)
            pen.text((x, at), line, fill="white", font=font, anchor="mm")
    return picture


def runs(steps: Sequence[int]) -> list[str]:
    """Rising numbers, three or more that follow each other as one run: 1, 4, 5, 6, 9 → "1", "4–6", "9"."""
    found: list[list[int]] = []
    for step in steps:
        if found and step == found[-1][-1] + 1:
            found[-1].append(step)
        else:
            found.append([step])
    return [text for own in found for text in ([f"{own[0]}–{own[-1]}"] if len(own) > 2 else map(str, own))]


def wrapped(parts: Sequence[str], length: Callable[[str], float], most: float) -> list[str]:
    """Parts with commas between them, in lines no longer than ``most`` where a part alone is not."""
    lines = [parts[0]]
    for part in parts[1:]:
        longer = f"{lines[-1]}, {part}"
        if length(longer) <= most:
            lines[-1] = longer
        else:
            lines.append(part)
    return lines


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
