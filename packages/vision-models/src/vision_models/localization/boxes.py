"""From maps to boxes: the largest connected part above a threshold, and how well a box fits."""

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE_EPS = 1e-5  # of the official min-max scaling


def scaled(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, y, x) to [0, 1], each for itself, then bilinearly to (B, Y, X)."""
    flat = maps.flatten(1)
    low, high = flat.amin(1)[:, None, None], flat.amax(1)[:, None, None]
    return F.interpolate(((maps - low) / (high - low + SCALE_EPS))[:, None], size, mode="bilinear")[:, 0]


def components(mask: Tensor) -> Tensor:
    """Numbers of the connected parts (corners touch) of masks (B, Y, X); 0 outside, parts of one mask differ."""
    height, width = mask.shape[1:]
    own = torch.arange(1, height * width + 1, device=mask.device, dtype=torch.float32).view(1, height, width)
    labels = own * mask
    while True:  # the largest number of a part walks through it, a step a round
        spread = F.max_pool2d(labels[:, None], 3, stride=1, padding=1)[:, 0] * mask
        if torch.equal(spread, labels):
            return labels.long()
        labels = spread


def largest_boxes(maps: Tensor, threshold: float) -> Tensor:
    """Corners (left, top, right, bottom), in pixels and exclusive, of the largest part above ``threshold``: (B, 4).

    Args:
        maps: (B, Y, X), as :func:`scaled` gives. A map without any place above is the whole picture.
    """
    height, width = maps.shape[1:]
    labels = components(maps > threshold)
    boxes = torch.tensor([0, 0, width, height]).repeat(len(maps), 1)
    for box, label in zip(boxes, labels, strict=True):
        counts = torch.bincount(label.flatten())
        counts[0] = 0
        if counts.sum() == 0:
            continue
        part = label == counts.argmax()
        rows, columns = part.any(1).nonzero()[:, 0], part.any(0).nonzero()[:, 0]
        box.copy_(torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]))
    return boxes


def iou(boxes: Tensor, others: Tensor) -> Tensor:
    """Intersection over union of boxes (…, 4) with others (…, 4), corner by corner in pixels."""
    boxes, others = boxes.double(), others.double()
    low, high = torch.maximum(boxes[..., :2], others[..., :2]), torch.minimum(boxes[..., 2:], others[..., 2:])
    common = (high - low).clamp(min=0).prod(-1)
    areas = [(b[..., 2:] - b[..., :2]).clamp(min=0).prod(-1) for b in (boxes, others)]
    return common / (areas[0] + areas[1] - common).clamp(min=1e-12)
