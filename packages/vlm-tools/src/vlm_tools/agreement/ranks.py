"""Rank correlations of explanations: Kendall's tau-b, top-k Kendall with ties, weighted tau; and what chance gives.

A Song of (Dis)agreement (Neely, Schouten, Bleeker, Lucic 2022, arXiv 2205.04559; before it, Order in the Court, arXiv
2105.03287; https://github.com/michaeljneely/court-of-xai, ``kendall_top_k.py``). Top-k Kendall is Fagin et al. 2004
(PODS, doi 10.1145/1055558.1055568): equal scores share a bucket, and "top k" are the first k *buckets*. Over unordered
pairs of one element of each list's top: opposite strict orders cost 1, tied in one list only ``penalty``, all else 0.
Weighted tau is Vigna 2015 (WWW, doi 10.1145/2736277.2741088), additive weights
(rank + 1)^−alpha.

What differs from the official code: rows of a batch at once, quadratic memory in place of loops; the p-value of a
permutation baseline beside each number, without which the numbers of two k cannot be compared. Numbers are checked in
``tests/agreement/test_ranks.py`` (definitions in loops, scipy, and the official code's own examples).

Agreement is no sign of truth: two explanations may be wrong alike. See `vlm_tools.agreement.faithfulness`.
"""

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float
from torch import Tensor

Measure = Literal["kendall", "top_k", "weighted"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


def kendall_tau(a: Float[Tensor, "*S N"], b: Float[Tensor, "*S N"]) -> Float[Tensor, "*S"]:
    """Kendall's tau-b: 1 same order, −1 opposite; NaN where a list is constant.

    Raises:
        ValueError: lists of different shapes, empty, or not finite.
    """
    x, y = _orders(a, b, "kendall_tau")
    return _correlation(x, y, x.new_ones(()))


def weighted_tau(a: Float[Tensor, "*S N"], b: Float[Tensor, "*S N"], *, alpha: float = 1.0) -> Float[Tensor, "*S"]:
    """Tau in which pairs of high ranks count more: the mean over both lists' rankings; NaN where a list is constant.

    Args:
        alpha: a rank r from 0 on weighs (r + 1)^−alpha; 0 gives tau-b.

    Raises:
        ValueError: as `kendall_tau`; a negative alpha.
    """
    if not alpha >= 0:
        raise ValueError(f"weighted_tau: alpha must not be negative, got alpha={alpha}")
    x, y = _orders(a, b, "weighted_tau")
    total = x.new_zeros(())
    for first, second in ((a, b), (b, a)):
        weight = (_lexicographic_rank(first, second) + 1) ** -alpha
        total = total + _correlation(x, y, weight[..., :, None] + weight[..., None, :])
    return total / 2


def top_k_kendall(
    a: Float[Tensor, "*S N"],
    b: Float[Tensor, "*S N"],
    k: int | Literal["nonzero"] | None = None,
    *,
    penalty: float = 0.5,
) -> Float[Tensor, "*S"]:
    """Kendall's distance of the first k buckets of either list, as a correlation in [−1, 1].

    Args:
        k: buckets of equal scores; all by default. ``"nonzero"``: the smaller number of scores that are not 0. Without
            a pair to compare (k = 1 and the same first element) the lists agree: 1.
        penalty: of a pair that is tied in one list only, in (0, 1]; a metric from 1/2 on.

    Raises:
        ValueError: as `kendall_tau`; k below 1, a penalty outside (0, 1].
    """
    if not 0 < penalty <= 1:
        raise ValueError(f"top_k_kendall: penalty must lie in (0, 1], got penalty={penalty}")
    if k is not None and k != "nonzero" and (isinstance(k, str) or k < 1):
        raise ValueError(f"top_k_kendall: k must be at least 1 or 'nonzero', got k={k!r}")
    x, y = _orders(a, b, "top_k_kendall")
    if k == "nonzero":
        limit = torch.minimum((a != 0).sum(-1, keepdim=True), (b != 0).sum(-1, keepdim=True))
    else:
        limit = torch.tensor(a.shape[-1] if k is None else k, device=a.device)
    top_a, top_b = _bucket(a) < limit, _bucket(b) < limit
    pairs = top_a[..., :, None] & top_b[..., None, :]
    pairs = (pairs | pairs.transpose(-2, -1)).triu(1)
    cost = (x * y < 0).double() + penalty * ((x == 0) != (y == 0)).double()
    count = pairs.sum((-2, -1))
    return 1 - 2 * (cost * pairs).sum((-2, -1)) / count.clamp_min(1)


class Chance(NamedTuple):
    """A correlation beside what chance gives.

    Attributes:
        observed: mean over the samples.
        chance: the same mean with one list of each sample shuffled, averaged over permutations. It is 0 for tau, not
            for top-k Kendall.
        p: share of permutations, the observed one included, that agree as much: one-sided.
    """

    observed: float
    chance: float
    p: float


def against_chance(
    a: Float[Tensor, "S N"],
    b: Float[Tensor, "S N"],
    measure: Measure,
    *,
    k: int | Literal["nonzero"] | None = None,
    permutations: int = 200,
    seed: int = 0,
) -> Chance:
    """The mean correlation of S pairs of lists, and of as many shuffled ones. Samples without a value are left out.

    Shuffling forgets that neighbors on a picture have alike relevance, which makes smooth maps agree by chance more
    often than p says; the no-image control of a reading is the stricter test.

    Args:
        k: of ``"top_k"``.

    Raises:
        ValueError: unknown measure, fewer than one permutation, lists as in `kendall_tau`.
    """
    if measure not in MEASURES:
        raise ValueError(f"against_chance: measure must be one of {', '.join(MEASURES)}, got measure={measure!r}")
    if permutations < 1:
        raise ValueError(f"against_chance: permutations must be at least 1, got permutations={permutations}")
    correlate: Callable[[Tensor, Tensor], Tensor] = {
        "kendall": kendall_tau, "top_k": functools.partial(top_k_kendall, k=k), "weighted": weighted_tau
    }[measure]  # fmt: skip
    observed = float(correlate(a, b).nanmean())
    if observed != observed:  # every sample has a constant list
        return Chance(observed, observed, observed)
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.empty(permutations, dtype=torch.float64)
    for number in range(permutations):
        order = torch.rand(b.shape, generator=generator).argsort(-1).to(b.device)
        shuffled[number] = correlate(a, b.gather(-1, order)).nanmean()
    # Sums of the same terms in another order differ in the last bits.
    as_much = int((shuffled >= observed - 1e-12).sum())
    return Chance(observed, float(shuffled.mean()), (as_much + 1) / (permutations + 1))


def _orders(a: Tensor, b: Tensor, caller: str) -> tuple[Float[Tensor, "*S N N"], Float[Tensor, "*S N N"]]:
    """Sign of x_i − x_j for both lists."""
    if a.shape != b.shape or a.dim() == 0:
        raise ValueError(f"{caller}: both lists must have one shape (…, N), got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.shape[-1] == 0:
        raise ValueError(f"{caller}: the lists are empty, got shape {tuple(a.shape)}")
    for name, x in (("a", a), ("b", b)):
        if not bool(x.isfinite().all()):
            raise ValueError(f"{caller}: {name} holds NaN or infinite scores, which have no rank")
    x, y = ((v.double()[..., :, None] - v.double()[..., None, :]).sign() for v in (a, b))
    return x, y


def _correlation(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Σ w x y / √(Σ w x² · Σ w y²) over pairs."""
    both, left, right = ((weight * term).sum((-2, -1)) for term in (x * y, x * x, y * y))
    return both / (left * right).sqrt()


def _lexicographic_rank(first: Tensor, second: Tensor) -> Tensor:
    """From 0 for the largest by (first, second) on."""
    order = second.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, first.gather(-1, order).argsort(dim=-1, descending=True, stable=True))
    return order.argsort(-1).double()


def _bucket(x: Tensor) -> Tensor:
    """Number of distinct larger scores."""
    ordered, order = x.sort(-1, descending=True)
    fresh = torch.zeros_like(order)
    fresh[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    return torch.zeros_like(order).scatter(-1, order, fresh.cumsum(-1))
