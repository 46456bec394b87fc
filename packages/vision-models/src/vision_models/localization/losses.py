"""What pulls SAT's map apart: an area for the batch, and decisions for each place."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def smoothing_kernel() -> Tensor:
    """3×3, sums to 1: the official square root of products of masses of a normal distribution cut at ±6 widths."""
    width = 13 / 3
    edges = [-6 - width / 2 + i * (12 + width) / 3 for i in range(4)]
    below = [0.5 * (1 + math.erf(edge / 2**0.5)) for edge in edges]
    mass = torch.tensor([b - a for a, b in pairwise(below)], dtype=torch.float64)
    kernel = torch.outer(mass, mass).sqrt()
    return (kernel / kernel.sum()).float()


def batch_area_loss(maps: Tensor, area: float) -> Tensor:
    """How far the mean of all maps (B, y, x) is from ``area``: small and large objects make up for each other."""
    return (maps.mean() - area).abs()


def normalization_loss(maps: Tensor) -> Tensor:
    """Mean of m(1 − m) over smoothed maps (B, y, x): 0 where every place is clearly in or out; zeros lie outside."""
    kernel = smoothing_kernel().to(maps)[None, None]
    smooth = F.conv2d(maps[:, None], kernel, padding=1)
    return ((1 - smooth) * smooth).mean()
