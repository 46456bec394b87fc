"""READ: the similarity of image tokens to one token as points for a segmenter.

Paper: Qian et al., Reasoning to Attend: Try to Understand How <SEG> Token Works, CVPR 2025, arXiv 2412.17741.
Official code: rui-qian/READ, ``model/READ.py`` (``similarity_map_to_points``).

The same: dot products, smoothing by a smaller grid, scaling to [0, 1], undoing of the center crop, positive points
first, then negative, then neutral ones, labels 1, 0, −1; the differentiable coordinates. Different: those are summed
over a window of ±6 pixels instead of the whole picture (the rest weighs less than e^−36); a constant similarity is an
error. Any token may ask, not only a trained ``[SEG]``. Checked in ``tests/readings/test_read.py``.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

WINDOW = 6


def similarity(image: Float[Tensor, "T C"], token: Float[Tensor, " C"]) -> Float[Tensor, " T"]:
    """Dot products of image tokens with one token (last hidden states)."""
    return image @ token


def similarity_points(
    scores: Float[Tensor, " T"],
    size: tuple[int, int],
    *,
    down: int = 2,
    count: int = 30,
    positive: float = 0.8,
    negative: float = 0.2,
    continuous: bool = True,
) -> tuple[Float[Tensor, "K 2"], Int[Tensor, " K"]]:
    """Points (x, y) in pixels and labels: 1 object, 0 background, −1 neither.

    Args:
        scores: similarity of each token of a square grid, row by row.
        size: height and width of the picture.
        down: the grid is shrunk by it first. Official: 2 for 7B, 1 for 13B.
        count: points at most. Official: 30 and 60.
        positive, negative: thresholds in [0, 1]. Official: 0.8 and 0.2; 0.6 and 0.2.
        continuous: coordinates that are differentiable in ``scores``; whole pixels otherwise.

    Raises:
        ValueError: no square grid, constant scores.
    """
    side = round(len(scores) ** 0.5)
    if side * side != len(scores) or side < down:
        raise ValueError(f"similarity_points: scores must fill a square grid of at least {down}², got {len(scores)}")
    if not bool(scores.max() > scores.min()):
        raise ValueError("similarity_points: scores are constant, no point stands out")
    grid = scores.view(1, 1, side, side).float()
    small = side // down
    coarse = _unit(F.interpolate(grid, (small, small), mode="bilinear")[0, 0])
    padded = _uncropped(coarse, small, size, fill=-1.0)
    height, width = padded.shape
    flat = padded.flatten()
    best = torch.nonzero(flat >= positive).flatten()
    worst = torch.nonzero((flat >= 0) & (flat <= negative)).flatten()
    rest = torch.nonzero((flat > negative) & (flat < positive)).flatten()
    best = best[flat[best].argsort(descending=True)]
    worst = worst[flat[worst].argsort()]
    chosen = torch.cat([best, worst, rest])[:count]
    labels = torch.cat([torch.ones_like(best), torch.zeros_like(worst), -torch.ones_like(rest)])[:count]
    x = ((chosen % width + 0.5) * (size[1] / width)).clamp_max(size[1] - 1).long()
    y = ((chosen // width + 0.5) * (size[0] / height)).clamp_max(size[0] - 1).long()
    points = torch.stack([x, y], dim=1)
    return (_continuous(grid, size, points) if continuous else points.float()), labels


def _continuous(grid: Float[Tensor, "1 1 y x"], size: tuple[int, int], points: Int[Tensor, "K 2"]) -> Tensor:
    """Σ g·w over pixels g near each point p, w ∝ exp(−|g − p|²)·softmax(similarity at g)."""
    whole = F.interpolate(_unit(grid), (336, 336), mode="bilinear")[0, 0]
    whole = F.interpolate(_uncropped(whole, 336, size, fill=0.0)[None, None], size, mode="bilinear")[0, 0]
    offset = torch.arange(-WINDOW, WINDOW + 1, device=grid.device)
    x = points[:, 0, None, None] + offset[None, None, :]
    y = points[:, 1, None, None] + offset[None, :, None]
    inside = (x >= 0) & (x < size[1]) & (y >= 0) & (y < size[0])
    value = whole[y.clamp(0, size[0] - 1), x.clamp(0, size[1] - 1)]
    distance = (offset[:, None] ** 2 + offset[None] ** 2).float()
    weight = (value - distance).masked_fill(~inside, -torch.inf).flatten(1).softmax(-1).view_as(value)
    return torch.stack([(weight * x).sum((1, 2)), (weight * y).sum((1, 2))], dim=1)


def _uncropped(square: Float[Tensor, "y x"], side: int, size: tuple[int, int], *, fill: float) -> Tensor:
    """The centered square of a picture, surrounded by what was cropped away."""
    scale = side / min(size)
    pad_y, pad_x = (int(size[0] * scale) - side) // 2, (int(size[1] * scale) - side) // 2
    return F.pad(square, (pad_x, pad_x, pad_y, pad_y), value=fill)


def _unit(x: Tensor) -> Tensor:
    return (x - x.min()) / (x.max() - x.min())
