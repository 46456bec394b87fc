# pyright: reportCallIssue=false, reportArgumentType=false
# Operands are unpacked from lists and dictionaries.
"""rank_augmented_attention against its N×N weights."""

import pytest
import torch
from torch import Tensor

from attn_core import rank_augmented_attention
from attn_core.testing import relative_error


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def phi(x: Tensor) -> Tensor:
    return torch.where(x > 0, x + 1, x.exp())


def turned(x: Tensor, angle: Tensor) -> Tensor:
    """Pairs as complex numbers, multiplied by exp(iθ)."""
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def definition(q: Tensor, k: Tensor, v: Tensor, angle: Tensor, scale: float, eps: float) -> Tensor:
    n = q.shape[2]
    Q, K = phi(q), phi(k)
    w = n * (scale * Q.mean(2, keepdim=True) @ K.mT).softmax(-1).mT
    K = K * w
    numerator = turned(Q, angle) @ turned(K, angle).mT
    return (numerator / (Q @ K.mT).sum(-1, keepdim=True).add(n * eps)) @ v


@pytest.mark.parametrize("tokens", [1, 12, 37])
@pytest.mark.parametrize("rotate", [False, True])
def test_output_and_gradients_equal_the_weights_in_full(tokens: int, rotate: bool) -> None:
    inputs = [random(2, 3, tokens, 6, seed=i) for i in range(2)] + [random(2, 3, tokens, 5, seed=2)]
    angle = random(tokens, 3, seed=4).detach() if rotate else torch.zeros(tokens, 3, dtype=torch.float64)
    double = angle.repeat_interleave(2, -1)
    options = {"sin": double.sin(), "cos": double.cos()} if rotate else {}
    expected = definition(*inputs, angle, 0.4, 1e-3)
    actual = rank_augmented_attention(*inputs, scale=0.4, eps=1e-3, **options)
    assert relative_error(actual, expected) <= 1e-10
    weight = torch.randn_like(expected)
    pairs = zip(*(torch.autograd.grad((out * weight).sum(), inputs) for out in (actual, expected)), strict=True)
    assert all(relative_error(got, want) <= 2e-10 for got, want in pairs)


def test_without_rotation_equal_values_are_returned() -> None:
    q, k = random(1, 2, 9, 4), random(1, 2, 9, 4, seed=1)
    ones = torch.ones(1, 2, 9, 3, dtype=torch.float64)
    assert relative_error(rank_augmented_attention(q, k, ones, eps=0.0), ones) <= 1e-12


def test_bfloat16_stays_within_its_tolerance() -> None:
    inputs = [random(2, 2, 64, 16, seed=i).detach().bfloat16() for i in range(3)]
    out = rank_augmented_attention(*inputs)
    expected = definition(*(x.double() for x in inputs), torch.zeros(64, 8).double(), 0.25, 1e-6)
    assert out.dtype == torch.bfloat16
    assert relative_error(out, expected) <= 2e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 9, 4)}, r"rank_augmented_attention: q must have 4 dimensions \(B H N D\)"),
        ({"k": torch.zeros(2, 9, 4)}, r"k must have 4 dimensions \(B H N D\)"),
        ({"sin": torch.zeros(9, 4)}, "sin must be given with cos and cos with sin"),
        ({"cos": torch.zeros(9, 4)}, "sin must be given with cos and cos with sin, got sin=None"),
        ({"sin": torch.zeros(8, 4), "cos": torch.zeros(9, 4)}, r"sin must be of shape \(9, 4\) with an even width"),
        ({"sin": torch.zeros(9, 4), "cos": torch.zeros(9, 2)}, r"cos must be of shape \(9, 4\) with an even width"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    arguments = {name: torch.zeros(2, 3, 9, 4) for name in "qkv"} | changes
    with pytest.raises(ValueError, match=message):
        rank_augmented_attention(**arguments)
