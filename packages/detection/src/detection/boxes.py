"""Boxes: formats, overlaps, and Plain-DETR's two parametrizations. xyxy and cxcywh are (…, 4).

Source: DETR (arXiv 2005.12872) and https://github.com/impiga/Plain-DETR, ``util/box_ops.py``. Checked in:
``test_boxes.py``.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

MAX_LOG_RATIO = abs(math.log(16 / 1000))


def cxcywh_to_xyxy(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Center and size → corners."""
    center, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat([center - half, center + half], -1)


def xyxy_to_cxcywh(boxes: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Corners → center and size."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)


def inverse_sigmoid(x: Float[Tensor, "..."], eps: float = 1e-5) -> Float[Tensor, "..."]:
    """log(x / (1 − x)), both kept above ``eps``."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def pairwise_giou(a: Float[Tensor, "N 4"], b: Float[Tensor, "M 4"]) -> Float[Tensor, "N M"]:
    """Generalized IoU of every pair of xyxy boxes, in [−1, 1]; boxes turned inside out count as empty."""
    return giou(a[:, None], b[None])


def giou(a: Float[Tensor, "*n 4"], b: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n"]:
    """Generalized IoU of broadcast xyxy boxes (Rezatofighi et al., CVPR 2019). Not finite only for empty hulls."""
    area_a = (a[..., 2:] - a[..., :2]).prod(-1)
    area_b = (b[..., 2:] - b[..., :2]).prod(-1)
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    union = area_a + area_b - overlap
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(min=0).prod(-1)
    return overlap / union - (hull - union) / hull


def apply_deltas(
    reference: Float[Tensor, "*n 4"], deltas: Float[Tensor, "*n 4"], limit: Float[Tensor, "*m 4"]
) -> Float[Tensor, "*n 4"]:
    """cxcywh boxes moved by (Δx·w, Δy·h) and scaled by exp Δ, cut off at 0 and at ``limit`` (x, y, x, y), in pixels.

    Scales are limited to 1000/16. Where a corner is cut off its gradient is zero. Not the inverse of `deltas_of`.
    """
    center = reference[..., :2] + reference[..., 2:] * deltas[..., :2]
    half = reference[..., 2:] * deltas[..., 2:].clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() * 0.5
    corners = torch.cat([center - half, center + half], -1)
    return xyxy_to_cxcywh(torch.minimum(corners.clamp(min=0), limit))


def deltas_of(reference: Float[Tensor, "*n 4"], target: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
    """Deltas that training asks for; sizes of the reference are enlarged by 0.1 pixels, as in the official code."""
    size = reference[..., 2:] + 0.1
    return torch.cat([(target[..., :2] - reference[..., :2]) / size, torch.log(target[..., 2:] / size)], -1)
