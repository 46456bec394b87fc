"""Dice with cross-entropy, and the official formula that it replaces."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F


class DiceCE(nn.Module):
    """(1 − mean Dice of the foreground classes) + cross-entropy.

    The official loss of AGUNet adds the background's Dice and divides by the number of foreground classes: as soon as
    the background is roughly right it is clipped to 0, and a small lesion receives no gradient at all.
    ``dice="official"`` computes it.

    Args:
        dice: ``"foreground"``, or ``"official"`` for that formula.
        dice_weight, ce_weight: of the two terms.
        smooth: added to numerator and denominator.
        squared: sums of squares in the denominator, as officially, instead of sums.

    Shapes: logits (B, K, *grid), target (B, *grid) → scalar. Sums run over the batch and the grid, in float32.
    Raises: ValueError for an unknown formula.
    """

    def __init__(
        self,
        *,
        dice: Literal["foreground", "official"] = "foreground",
        dice_weight: float = 1.0,
        ce_weight: float = 1.0,
        smooth: float = 1.0,
        squared: bool = False,
    ) -> None:
        super().__init__()
        if dice not in ("foreground", "official"):
            raise ValueError(f"DiceCE: dice must be 'foreground' or 'official', got dice={dice!r}")
        self.official = dice == "official"
        self.dice_weight = dice_weight
        self.ce_weight = ce_weight
        self.smooth = smooth
        self.squared = squared or self.official

    def forward(self, logits: Float[Tensor, "B K *grid"], target: Int[Tensor, "B *grid"]) -> Float[Tensor, ""]:
        """The loss of a batch, computed in float32 under autocast too."""
        logits = logits.float()
        classes = logits.shape[1]
        log_probability = F.log_softmax(logits, 1)
        ce = F.nll_loss(log_probability, target)
        p = log_probability.exp()
        t = torch.zeros_like(p).scatter_(1, target.unsqueeze(1), 1.0)
        axes = (0, *range(2, logits.ndim))
        size = (p * p if self.squared else p).sum(axes) + t.sum(axes)
        scores = (2 * (p * t).sum(axes) + self.smooth) / (size + self.smooth)
        if self.official:
            dice = (1 - scores.sum() / (classes - 1)).clamp(0, 1 - 1e-10)
        else:
            dice = 1 - (scores[1:] if classes > 1 else scores).mean()
        return self.dice_weight * dice + self.ce_weight * ce
