"""landmark_attention against the grouped softmax written out query by query."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_core import attention, landmark_attention
from attn_core.testing import TOLERANCE, relative_error


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def definition(q: Tensor, k: Tensor, v: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Probabilities of one query at a time: first over own tokens and landmarks, then inside each landmark's block."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT * q.shape[3] ** -0.5
    rows, lses = [], []
    for i in range(q.shape[2]):
        own = i // block
        tokens = [j for j in range(own * block, i + 1) if j % block != block - 1]
        landmarks = [g * block + block - 1 for g in range(own)]
        first = s[:, :, i, tokens + landmarks]
        p = first.softmax(-1)
        row = (p[..., : len(tokens), None] * v[:, :, tokens]).sum(2)
        for n, landmark in enumerate(landmarks):
            members = list(range(landmark - block + 1, landmark))
            inside = s[:, :, i, members].softmax(-1)
            row = row + p[..., len(tokens) + n, None] * (inside[..., None] * v[:, :, members]).sum(2)
        rows.append(row)
        lses.append(first.logsumexp(-1))
    return torch.stack(rows, 2), torch.stack(lses, 2)


@pytest.mark.parametrize(
    ("tokens", "block", "key_heads", "width"),
    [(12, 4, 4, 8), (23, 5, 2, 8), (7, 9, 1, 8), (30, 2, 4, 3), (1, 2, 4, 8), (33, 16, 2, 5)],
)
def test_output_and_gradients_equal_the_grouped_softmax(tokens: int, block: int, key_heads: int, width: int) -> None:
    q = random(2, 4, tokens, 8).requires_grad_()
    k = random(2, key_heads, tokens, 8, seed=1).requires_grad_()
    v = random(2, key_heads, tokens, width, seed=2).requires_grad_()
    expected, actual = definition(q, k, v, block), landmark_attention(q, k, v, block)
    losses = []
    for (out, lse), (want, want_lse) in ((actual, expected), (expected, expected)):
        assert relative_error(out, want) <= 1e-10
        assert relative_error(lse, want_lse) <= 1e-10
        losses.append((out * random(*out.shape, seed=3)).sum() + lse.sin().sum())
    for got, want in zip(*(torch.autograd.grad(loss, (q, k, v)) for loss in losses), strict=True):
        assert relative_error(got, want) <= 2e-10


@settings(deadline=None, max_examples=15)
@given(tokens=st.integers(2, 30), block=st.integers(2, 8), cut=st.integers(0, 29))
def test_the_future_has_no_influence(tokens: int, block: int, cut: int) -> None:
    cut = min(cut, tokens - 1)
    q, k, v = random(1, 2, tokens, 4), random(1, 2, tokens, 4, seed=1), random(1, 2, tokens, 4, seed=2)
    expected = landmark_attention(q, k, v, block)[0][:, :, : cut + 1]
    k[:, :, cut + 1 :] += 5
    v[:, :, cut + 1 :] -= 7
    assert relative_error(landmark_attention(q, k, v, block)[0][:, :, : cut + 1], expected) <= 1e-12


def test_values_of_landmarks_are_never_read() -> None:
    q, k, v = random(1, 2, 12, 4), random(1, 2, 12, 4, seed=1), random(1, 2, 12, 4, seed=2)
    expected = landmark_attention(q, k, v, 4)
    v[:, :, 3::4] = math.nan
    for a, b in zip(landmark_attention(q, k, v, 4), expected, strict=True):
        assert torch.equal(a, b)


def test_one_incomplete_block_is_causal_attention() -> None:
    q, k, v = random(1, 2, 6, 4), random(1, 2, 6, 4, seed=1), random(1, 2, 6, 4, seed=2)
    for a, b in zip(landmark_attention(q, k, v, 9), attention(q, k, v, causal="upper_left"), strict=True):
        assert relative_error(a, b) <= 1e-12


def test_scale_reaches_gates_and_tokens() -> None:
    q, k, v = random(1, 2, 12, 4), random(1, 2, 12, 4, seed=1), random(1, 2, 12, 4, seed=2)
    for a, b in zip(landmark_attention(q, k, v, 4, scale=1.0), landmark_attention(2 * q, k, v, 4), strict=True):
        assert relative_error(a, b) <= 1e-12


def test_autocast_runs_in_its_dtype() -> None:
    q, k, v = (random(1, 2, 12, 4, seed=s).float() for s in range(3))
    expected = landmark_attention(q, k, v, 4)[0]
    with torch.autocast("cpu", torch.bfloat16):
        actual = landmark_attention(q, k, v, 4)[0]
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual, expected) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    ("q", "k", "block", "message"),
    [
        ((2, 6, 8), (1, 2, 6, 8), 3, r"landmark_attention: q must have 4 dimensions \(B H N D\)"),
        ((1, 2, 6, 8), (2, 6, 8), 3, r"k must have 4 dimensions \(B Hk N D\)"),
        ((1, 2, 6, 8), (1, 2, 5, 8), 3, r"k must have size 6 along dimension 2 \(the tokens of q\)"),
        ((1, 2, 6, 8), (1, 2, 6, 8), 1, "block must be at least 2, a token and its landmark, got block=1"),
    ],
)
def test_bad_arguments_are_named(q: tuple[int, ...], k: tuple[int, ...], block: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        landmark_attention(torch.zeros(q), torch.zeros(k), torch.zeros(k), block)
