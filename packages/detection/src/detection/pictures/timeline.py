"""Timelines: events of a video below what was found of it. Checked in: ``pictures/test_timeline.py``."""

from collections.abc import Sequence

from PIL import Image, ImageDraw

from detection.metrics.events import Events
from detection.pictures.boxes import GAP
from detection.pictures.fonts import writable

WIDTH, ROW, HEAD, SIDE = 960, 18, 24, 70  # pixels
TRUTH = "#1971c2"
COLORS = ("#e03131", "#2f9e44", "#9c36b5", "#e8590c", "#0c8599", "#846358", "#c2255c", "#5f3dc4")


def draw_timeline(
    title: str, truth: Events, found: Events, duration: float, classes: Sequence[str] = (), *, shown: int = 8
) -> Image.Image:
    """Truth in blue above, below it the best ``shown`` proposals, one row each with its score; time in seconds.

    Proposals of a class have its color and its name.
    """
    order = found.scores.argsort()[::-1][:shown]
    rows = len(order) + 1
    page = Image.new("RGB", (WIDTH, HEAD + (rows + 1) * ROW + 2 * GAP), "white")
    pen = ImageDraw.Draw(page)
    shown_title, font = writable(title, 14)
    pen.text((GAP, 4), shown_title, fill="black", font=font)
    scale = (WIDTH - SIDE - 2 * GAP) / duration if duration > 0 else 0.0

    def bar(row: int, start: float, end: float, color: str, text: str) -> None:
        y = HEAD + row * ROW
        x0, x1 = (SIDE + GAP + min(max(value, 0.0), duration) * scale for value in (start, end))
        pen.rectangle((x0, y + 2, max(x1, x0 + 2), y + ROW - 3), fill=color)
        words, small = writable(text, 11)
        if words and small.getlength(words) < x1 - x0 - 4:
            pen.text(((x0 + x1) / 2, y + ROW / 2), words, fill="white", font=small, anchor="mm")

    def label(row: int, text: str) -> None:
        words, small = writable(text, 11)
        pen.text((GAP, HEAD + row * ROW + ROW / 2), words, fill="black", font=small, anchor="lm")

    def name(labels: Sequence[int], place: int) -> str:
        return str(classes[labels[place]]) if len(classes) and len(labels) else ""

    label(0, "truth")
    for place, (start, end) in enumerate(truth.segments):
        bar(0, start, end, TRUTH, name(truth.labels.tolist(), place))
    for row, place in enumerate(order, 1):
        label(row, f"{found.scores[place]:.3f}")
        kind = int(found.labels[place]) if len(found.labels) else 0
        start, end = found.segments[place]
        bar(row, start, end, COLORS[kind % len(COLORS)], name(found.labels.tolist(), int(place)))
    y = HEAD + rows * ROW
    pen.line((SIDE + GAP, y, WIDTH - GAP, y), fill="black")
    for tick in range(5):
        words, small = writable(f"{duration * tick / 4:.0f} s", 11)
        pen.text((SIDE + GAP + (WIDTH - SIDE - 2 * GAP) * tick / 4, y + 3), words, fill="black", font=small,
                 anchor=("la", "ma", "ma", "ma", "ra")[tick])  # fmt: skip
    return page


def below(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one width below each other."""
    page = Image.new("RGB", (max(p.width for p in pictures), sum(p.height for p in pictures)), "white")
    y = 0
    for picture in pictures:
        page.paste(picture, (0, y))
        y += picture.height
    return page
