"""Boxes drawn into pictures."""

from collections.abc import Sequence

from PIL import ImageDraw
from torch import Tensor
from torchvision.transforms.v2 import functional as F

COLORS = ("#e03131", "#1971c2", "#2f9e44", "#f08c00", "#9c36b5", "#0c8599", "#e8590c", "#6741d9", "#c2255c", "#66a80f")


def draw(pixels: Tensor, boxes: Tensor, labels: Sequence[int], texts: Sequence[str]) -> Tensor:
    """(3, Y, X) uint8 with boxes; small pictures are enlarged, so that the texts can be read."""
    factor = max(1, round(384 / max(pixels.shape[-2:])))
    image = F.to_pil_image(pixels.repeat_interleave(factor, 1).repeat_interleave(factor, 2))
    pen = ImageDraw.Draw(image)
    for (x0, y0, x1, y1), label, text in zip((boxes * factor).tolist(), labels, texts, strict=True):
        color = COLORS[label % len(COLORS)]
        pen.rectangle((x0, y0, max(x0, x1), max(y0, y1)), outline=color, width=2)
        place = (x0 + 2, max(0.0, y0 - 11))
        pen.rectangle(pen.textbbox(place, text), fill=color)
        pen.text(place, text, fill="white")
    return F.pil_to_tensor(image)
