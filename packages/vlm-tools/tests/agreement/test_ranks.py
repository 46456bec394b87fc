"""Rank correlations against loops, scipy and the official code's examples; what chance gives; refusals."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor

from vlm_tools.agreement.ranks import MEASURES, against_chance, kendall_tau, top_k_kendall, weighted_tau

LISTS: dict[str, Callable[[int], Tensor]] = {
    "no ties": lambda n: torch.randn(2, n, dtype=torch.float64),
    "ties": lambda n: torch.randint(0, 4, (2, n)).double(),
    "sparse": lambda n: torch.randn(2, n, dtype=torch.float64) * (torch.rand(2, n) < 0.3),
}


def fagin(a: list[float], b: list[float], k: int, penalty: float) -> float:
    """Top-k Kendall in the words of the paper."""

    def top(scores: list[float]) -> set[int]:
        kept = sorted(set(scores), reverse=True)[:k]
        return {n for n, score in enumerate(scores) if score in kept}

    pairs = {frozenset(pair) for pair in itertools.product(top(a), top(b)) if pair[0] != pair[1]}
    distance = 0.0
    for i, j in map(tuple, pairs):
        first, second = a[i] - a[j], b[i] - b[j]
        distance += penalty if (first == 0) != (second == 0) else float(first * second < 0)
    return 1 - 2 * distance / max(1, len(pairs))


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("penalty", [0.5, 1.0])
def test_top_k_kendall_is_its_definition_with_ties_and_zeros(kind: str, penalty: float) -> None:
    torch.manual_seed(0)
    for size, k in itertools.product((1, 2, 9), (1, 3, None, "nonzero")):
        a, b = LISTS[kind](size)
        buckets: Any = min(int((a != 0).sum()), int((b != 0).sum())) if k == "nonzero" else k or size
        expected = fagin(a.tolist(), b.tolist(), buckets, penalty)
        assert float(top_k_kendall(a, b, k, penalty=penalty)) == pytest.approx(expected, abs=1e-15)  # type: ignore[arg-type]


def test_top_k_kendall_of_the_official_examples() -> None:
    up = torch.arange(1.0, 8)
    assert [float(top_k_kendall(up, up.flip(0), k)) for k in range(1, 8)] == [-1.0] * 7
    assert [float(top_k_kendall(up, up, k)) for k in range(1, 8)] == [1.0] * 7
    x, y = torch.tensor([1.0, 2, 3, 1, 1, 2, 2]), torch.tensor([3.0, 2, 1, 2, 1, 2, 1])
    for k in range(3, 8):  # three buckets; 8 of 21 pairs in opposite order, 10 tied in one list
        assert float(top_k_kendall(x, y, k)) == pytest.approx(1 - 2 * (8 + 10 * 0.5) / 21)


@pytest.mark.parametrize("kind", LISTS)
def test_tau_and_weighted_tau_are_scipys(kind: str) -> None:
    torch.manual_seed(1)
    for size in (2, 5, 17):
        a, b = LISTS[kind](size)
        expected: Any = stats.kendalltau(a.numpy(), b.numpy())[0]
        np.testing.assert_allclose(float(kendall_tau(a, b)), expected, atol=1e-12)
        for alpha in (0.0, 1.0, 2.0):
            ours = float(weighted_tau(a, b, alpha=alpha))
            theirs: Any = stats.weightedtau(a.numpy(), b.numpy(), weigher=lambda r, alpha=alpha: (r + 1) ** -alpha)[0]
            np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_rows_of_a_batch_are_as_alone() -> None:
    torch.manual_seed(2)
    a, b = torch.randint(0, 5, (2, 3, 4, 9)).double()
    for measure in (kendall_tau, weighted_tau, lambda x, y: top_k_kendall(x, y, 2),
                    lambda x, y: top_k_kendall(x, y, "nonzero")):  # fmt: skip
        alone = torch.stack([measure(x, y) for x, y in zip(a.flatten(0, 1), b.flatten(0, 1), strict=True)])
        torch.testing.assert_close(measure(a, b).flatten(), alone, atol=1e-15, rtol=0, equal_nan=True)


@pytest.mark.parametrize("measure", MEASURES)
def test_chance_tells_equal_lists_from_unrelated_and_opposite_ones(measure: Any) -> None:
    torch.manual_seed(5)
    a, b = torch.randn(2, 20, 12)
    same = against_chance(a, a, measure, k=3, permutations=50)
    assert same.observed == pytest.approx(1.0)
    assert same.p == pytest.approx(1 / 51)
    assert against_chance(a, -a, measure, k=3, permutations=50).p == 1.0
    unrelated = against_chance(a, b, measure, k=3, permutations=50)
    assert abs(unrelated.observed - unrelated.chance) < 0.25
    # What chance gives depends on k, so that top-k numbers cannot be read without it.
    assert (unrelated.chance < -0.3) == (measure == "top_k")
    assert against_chance(a, b, measure, k=3, permutations=50, seed=1) != unrelated
    assert against_chance(a, b, measure, k=3, permutations=50) == unrelated
    if measure == "top_k":
        assert against_chance(a, b, measure, permutations=50).chance == pytest.approx(0.0, abs=0.1)


def test_constant_lists_have_no_tau() -> None:
    flat, other = torch.ones(2, 4), torch.randn(2, 4)
    assert bool(kendall_tau(flat, other).isnan().all())
    assert all(math.isnan(value) for value in against_chance(flat, other, "kendall", permutations=3))
    mixed = torch.stack([flat[0], other[1]])
    assert against_chance(mixed, other, "kendall", permutations=3).observed == pytest.approx(1.0)


def test_lists_that_have_no_rank_are_refused() -> None:
    a = torch.randn(4)
    with pytest.raises(
        ValueError, match=r"^kendall_tau: both lists must have one shape \(…, N\), got \(4,\) and \(3,\)"
    ):
        kendall_tau(a, a[:3])
    with pytest.raises(ValueError, match=r"^weighted_tau: the lists are empty"):
        weighted_tau(a[:0], a[:0])
    with pytest.raises(ValueError, match=r"^top_k_kendall: b holds NaN or infinite scores"):
        top_k_kendall(a, a / 0)
    with pytest.raises(ValueError, match=r"^weighted_tau: alpha must not be negative, got alpha=-1"):
        weighted_tau(a, a, alpha=-1)
    for k in (0, "all"):
        with pytest.raises(ValueError, match=f"^top_k_kendall: k must be at least 1 or 'nonzero', got k={k!r}"):
            top_k_kendall(a, a, k)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^top_k_kendall: penalty must lie in \(0, 1\], got penalty=0"):
        top_k_kendall(a, a, penalty=0)
    with pytest.raises(ValueError, match=r"^against_chance: measure must be one of kendall, top_k, weighted"):
        against_chance(a[None], a[None], "spearman")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^against_chance: permutations must be at least 1"):
        against_chance(a[None], a[None], "kendall", permutations=0)
