"""Dice with cross-entropy."""

import pytest
import torch
from torch.nn import functional as F

from medical_seg.losses.dice_ce import DiceCE


def test_a_small_lesion_receives_a_gradient_where_the_official_loss_gives_none() -> None:
    logits = torch.zeros(1, 2, 32, 32)
    logits[:, 1] = -2.197  # foreground probability 0.1 everywhere
    target = torch.zeros(1, 32, 32, dtype=torch.long)
    target[0, 0, :2] = 1
    gradients = {}
    for dice in ("foreground", "official"):
        x = logits.clone().requires_grad_()
        DiceCE(dice=dice, ce_weight=0)(x, target).backward()
        assert x.grad is not None
        gradients[dice] = float(x.grad.abs().max())
    assert gradients["official"] == 0
    assert gradients["foreground"] > 0
    with pytest.raises(ValueError, match="dice must be 'foreground' or 'official', got dice='x'"):
        DiceCE(dice="x")  # pyright: ignore[reportArgumentType]


def test_the_loss_is_dice_and_cross_entropy() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 4, 5, dtype=torch.float64).float()
    target = torch.randint(0, 3, (2, 4, 5))
    flat, t = logits.movedim(1, -1).reshape(-1, 3), target.reshape(-1)
    p, onehot = flat.softmax(-1), F.one_hot(t, 3).float()
    dice = ((2 * (p * onehot).sum(0) + 1) / (p.sum(0) + onehot.sum(0) + 1))[1:].mean()
    expected = 2 * (1 - dice) + 3 * F.cross_entropy(flat, t)
    assert torch.allclose(DiceCE(dice_weight=2, ce_weight=3)(logits, target), expected)
    squared = ((2 * (p * onehot).sum(0) + 1) / ((p * p).sum(0) + onehot.sum(0) + 1))[1:].mean()
    assert torch.allclose(DiceCE(ce_weight=0, squared=True)(logits, target), 1 - squared)


def test_smoothing_pulls_dice_of_an_absent_class_towards_one() -> None:
    logits, target = torch.zeros(1, 2, 4, 4), torch.zeros(1, 4, 4, dtype=torch.long)
    found = [float(DiceCE(ce_weight=0, smooth=smooth)(logits, target)) for smooth in (1e-6, 1.0, 100.0)]
    assert found == pytest.approx([1.0, 1 - 1 / 9, 1 - 100 / 108], abs=1e-5)
