"""The losses of BMN: of boundaries, and of pairs by regression and by classification.

As ``loss_function.py`` of https://github.com/JJBOY/BMN-Boundary-Matching-Network (MIT) computes them, also on a CPU.
Where those are not finite (no event, or nothing else than events), the terms without members are 0. Where there are
more pairs of high than of middle or low overlap, the published draw counts every pair of the map, those that cannot be
included; here it stops at the pairs it draws from. Checked in: ``losses/test_boundary_matching.py``.
"""

import torch
from jaxtyping import Float
from torch import Tensor

EPSILON = 1e-6
HIGH, LOW, SURE = 0.7, 0.3, 0.9  # overlaps
REGRESSION = 10.0  # weight of the regression of pairs


def bmn_loss(
    pairs: Float[Tensor, "B 2 T T"],
    start: Float[Tensor, "B T"],
    end: Float[Tensor, "B T"],
    overlaps: Float[Tensor, "B T T"],
    starts: Float[Tensor, "B T"],
    ends: Float[Tensor, "B T"],
    valid: Float[Tensor, "T T"],
    draws: Float[Tensor, "2 B T T"] | None = None,
) -> dict[str, Tensor]:
    """``loss_boundary``, ``loss_regression`` (times 10) and ``loss_class``, whose sum is minimized.

    Args:
        pairs, start, end: what a `BMN` gives. overlaps, starts, ends: what should come out, in [0, 1].
        valid: 1 for pairs that can be.
        draws: numbers in [0, 1) that choose pairs of middle and of low overlap; by default torch's.
    """
    overlaps = overlaps * valid
    draws = torch.rand(2, *overlaps.shape, device=overlaps.device) if draws is None else draws
    with torch.autocast(pairs.device.type, enabled=False):
        wide = torch.promote_types(pairs.dtype, torch.float32)
        pairs, start, end = pairs.to(wide), start.to(wide), end.to(wide)
        every = torch.ones_like(start, dtype=torch.bool)
        return {
            "loss_boundary": balanced_loss(start, starts > 0.5, every) + balanced_loss(end, ends > 0.5, every),
            "loss_regression": REGRESSION * regression_loss(pairs[:, 0], overlaps, valid, draws),
            "loss_class": balanced_loss(pairs[:, 1], overlaps > SURE, (valid > 0).expand_as(overlaps)),
        }


def balanced_loss(scores: Float[Tensor, "*n"], positive: Tensor, counted: Tensor) -> Float[Tensor, ""]:
    """Binary cross-entropy in which positives and negatives weigh alike, averaged over what is counted."""
    positive = positive & counted
    negative = counted & ~positive
    many, few, count = negative.sum().clamp(min=1), positive.sum().clamp(min=1), counted.sum().clamp(min=1)
    gain = (scores + EPSILON).log() * positive / few + (1 - scores + EPSILON).log() * negative / many
    # Weights n / 2 positives and n / 2 negatives, over n: the count cancels.
    return -0.5 * gain.sum() * (counted.sum() / count)


def regression_loss(
    scores: Float[Tensor, "B T T"],
    overlaps: Float[Tensor, "B T T"],
    valid: Float[Tensor, "T T"],
    draws: Float[Tensor, "2 B T T"],
) -> Float[Tensor, ""]:
    """Half the squared error over pairs of high overlap and, drawn, about as many of middle and of low overlap."""
    high = overlaps > HIGH
    middle = (overlaps <= HIGH) & (overlaps > LOW)
    low = (overlaps <= LOW) & (overlaps > 0) & (valid > 0)
    chosen = high
    for group, draw in ((middle, draws[0]), (low, draws[1])):
        share = high.sum() / group.sum().clamp(min=1)
        chosen = chosen | (group & (draw > 1 - share))
    error = (scores - overlaps).square() * chosen
    return 0.5 * error.sum() / chosen.sum().clamp(min=1)
