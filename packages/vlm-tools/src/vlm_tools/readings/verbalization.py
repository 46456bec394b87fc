"""Saliency in words: searches for spans of tokens, their summary, and where on a picture the relevance lies.

Saliency Map Verbalization (Feldhus, Hennig, Nasert, Ebert, Schwarzenberg, Möller 2023, arXiv 2210.07222;
https://github.com/DFKI-NLP/SMV, ``src/search_methods``, ``src/tools.py``). Two searches slide binary masks over the
attributions and keep those whose mean exceeds a threshold; the total order ranks single tokens. The five best of each
by coverage are joined, neighbors merged, and spans below the upper quartile of coverage left out.

``official=True`` computes what the code computes. The repaired form differs where it goes wrong: windows reach the last
token; coverage counts it (there single tokens cover nothing, so that the total order names tokens 0 to 4, whatever they
say); a span's coverage is that of its own tokens; negative relevance is searched as positive, with the sign turned
(there masks with zeros never pass); scores are scaled by the largest magnitude; equally relevant spans are both named;
tokens at a span's ends that carry nothing leave it; too short texts and those without relevance give an empty list in
place of an error. The wording is ours. Masks are combinations, not permutations, so that a width of 12 is still cheap.
Checked in ``tests/readings/test_verbalization.py``.
"""

import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

Metric = Literal["mean", "quantile", "variance"]
METRICS: tuple[Metric, ...] = get_args(Metric)
Search = Literal["convolution", "span"]
Attributions = Sequence[float] | Float[NDArray[Any], " N"]
VALUES: dict[Metric, float] = {"mean": 0.4, "quantile": 3.0, "variance": 3.0}
MAX_WIDTH = 12
KEPT = 5  # of each search
QUARTILE = 0.75
LEAST_EXCESS = 0.05  # of relevance over area, from which a part of a picture is worth naming
_RASTER = 6  # divisible by halves and thirds
_MARKS = (("Ġ", " "), ("▁", " "), ("Ċ", "\n"))
_SPECIAL = {"<s>", "</s>", "<pad>", "[CLS]", "[SEP]", "[PAD]"}


class Candidate(NamedTuple):
    """Tokens that a search found.

    Attributes:
        indices: of the tokens, rising; a convolution leaves some out.
        score: their mean, in units of the largest attribution.
    """

    indices: tuple[int, ...]
    score: float


class Span(NamedTuple):
    """Neighboring tokens worth naming.

    Attributes:
        first, last: tokens, both included.
        coverage: their share of the positive relevance; of its magnitude against the prediction with ``sign="-"``.
    """

    first: int
    last: int
    coverage: float


class Region(NamedTuple):
    """A part of a picture.

    Attributes:
        name: such as ``"upper left quarter"``.
        share: of the positive relevance.
        area: of the picture.
    """

    name: str
    share: float
    area: float


def search(
    attributions: Attributions,
    kind: Search,
    *,
    width: int = 5,
    metric: Metric = "mean",
    value: float | None = None,
    sign: Literal["+", "-"] | None = None,
    official: bool = False,
) -> list[Candidate]:
    """Candidates of one search, from the end of the text to its begin.

    Args:
        kind: ``"convolution"``: masks of 2 to width − 2 ones anywhere; ``"span"``: odd runs of ones around the middle.
        width: of a mask.
        metric: a candidate's mean must exceed the mean of the top ``value`` of all attributions, or ``value`` times
            their standard deviation (``"quantile"``) or variance.
        value: 0.4 for the mean, 3 for the others by default.
        sign: all tokens of a candidate must speak for (``"+"``) or against the prediction.
        official: as the official code, faults included.

    Raises:
        ValueError: unknown kind, metric or sign; a width outside 3 … 12; a share outside (0, 1]; attributions that are
            not one list of finite numbers.
    """
    a = _checked(attributions, "search")
    _check_options(kind, width, metric, sign)
    value = VALUES[metric] if value is None else value
    if not value > 0 or (metric == "mean" and value > 1):
        raise ValueError(f"search: value must be positive, and at most 1 for the mean, got value={value}")
    if not len(a):
        return []
    if sign == "-" and not official:
        a = -a
    largest = abs(a.max()) if official else np.abs(a).max()
    if largest == 0:
        return []
    a = a.astype(np.float32) / np.float64(largest) if official else a / largest
    threshold = _threshold(a, metric, value, official)
    width = width if official else min(width, len(a))
    if kind == "span":
        width -= 1 - width % 2  # a run around the middle needs one
    found: dict[tuple[int, ...], float] = {}
    for mask in masks(kind, width):
        for start in range(len(a) - width + (not official)):
            window = a[start : start + width]
            covered = window[mask]
            if sign is not None and not _consistent(window, mask, sign, official):
                continue
            score = _mean(covered, official)
            if score > threshold:
                found.setdefault(tuple(start + place for place in mask), score)
    return [Candidate(indices, found[indices]) for indices in sorted(found, reverse=True)]


def masks(kind: Search, width: int) -> list[list[int]]:
    """Places of the ones of every mask of a search."""
    if kind == "span":
        return [list(range((width - ones) // 2, (width - ones) // 2 + ones)) for ones in range(3, width + 1, 2)]
    # As many ones as zeros on either side of the middle; three tokens have no such mask but the pairs.
    counts = range(2, max(width - 1, 3))
    return [list(places) for ones in counts for places in itertools.combinations(range(width), ones)]


def total_order(attributions: Attributions) -> list[tuple[int, float]]:
    """Tokens by falling attribution, each with its share of the positive relevance (0 where there is none).

    Raises:
        ValueError: as `search`.
    """
    a = _checked(attributions, "total_order")
    positive = float(a.clip(0).sum())
    order = sorted(range(len(a)), key=lambda n: -a[n])
    return [(n, float(a[n]) / positive if positive else 0.0) for n in order]


def summary(
    attributions: Attributions,
    *,
    width: int = 5,
    metric: Metric = "mean",
    value: float | None = None,
    sign: Literal["+", "-"] | None = None,
    official: bool = False,
) -> list[Span]:
    """The spans worth naming, most relevant first.

    Args:
        width, metric, value, sign, official: as of `search`.

    Raises:
        ValueError: as `search`.
    """
    a = _checked(attributions, "summary")
    options: dict[str, Any] = {
        "width": width, "metric": metric, "value": value, "sign": sign, "official": official
    }  # fmt: skip
    found = [[c.indices for c in search(attributions, kind, **options)] for kind in get_args(Search)]
    if sign == "-" and not official:
        a = -a
    if a.clip(0).sum() == 0 and not official:
        return []
    chosen: set[int] = set()
    for candidates in (*found, [(n,) for n in range(len(a))]):
        best = sorted(candidates, key=lambda indices: _coverage(a, indices, official), reverse=True)[:KEPT]
        chosen.update(n for indices in best if official or _coverage(a, indices, official) for n in indices)
    runs: list[list[int]] = []
    for n in sorted(chosen):
        if runs and runs[-1][-1] + 1 == n:
            runs[-1].append(n)
        else:
            runs.append([n])
    if not official:
        runs = [_trimmed(run, a) for run in runs]
    spans = [Span(run[0], run[-1], _coverage(a, (run[0], run[-1]) if official else run, official)) for run in runs]
    if not spans:
        return []
    quartile = np.quantile([span.coverage for span in spans], QUARTILE)
    spans = [span for span in spans if span.coverage >= quartile]
    if official:  # one span for each rank, the last of equals
        spans = list({span.coverage: span for span in spans}.values())
    return sorted(spans, key=lambda span: -span.coverage)


def verbalize(
    tokens: Sequence[str],
    attributions: Attributions,
    *,
    width: int = 5,
    metric: Metric = "mean",
    value: float | None = None,
    sign: Literal["+", "-"] | None = None,
    official: bool = False,
) -> str:
    """One sentence about the most relevant words, each with its share of the relevance.

    Args:
        tokens: as a tokenizer writes them; marks of spaces and pieces (``Ġ``, ``▁``, ``##``) are read.
        width, metric, value, sign, official: as of `search`; special tokens (``<s>``, ``[SEP]`` …) stand for nothing.

    Raises:
        ValueError: not as many tokens as attributions; as `search`.
    """
    if len(tokens) != len(attributions):
        raise ValueError(f"verbalize: {len(tokens)} tokens need as many attributions, got {len(attributions)}")
    told = []
    for span in summary(attributions, width=width, metric=metric, value=value, sign=sign, official=official):
        words = joined(tokens[span.first : span.last + 1])
        if words:
            told.append(f'"{words}" ({100 * span.coverage:.0f} %)')
    if not told:
        return "No word stands out."
    head = "Most against it" if sign == "-" else "Most relevant"
    return f"{head}: {told[0]}" + (f"; then {', '.join(told[1:])}." if told[1:] else ".")


def joined(tokens: Sequence[str]) -> str:
    """Text of neighboring tokens, special ones left out."""
    kept = [token for token in tokens if token not in _SPECIAL]
    marked = any(mark in token for token in kept for mark, _ in _MARKS)
    text = ""
    for token in kept:
        if token.startswith("##"):
            text += token[2:]
            continue
        text += token if marked else f" {token}"
    for mark, meaning in _MARKS:
        text = text.replace(mark, meaning)
    return " ".join(text.split())


def regions(heat: Float[NDArray[Any], "Y X"], *, most: int = 2) -> list[Region]:
    """Parts of a picture that hold more relevance than their area, most of it first; disjoint.

    Halves, thirds, quarters and ninths compete by share − area, the relevance beyond an even spread. Negative relevance
    counts nothing. Empty where no part holds 5 % more than its area.

    Args:
        most: parts to name.

    Raises:
        ValueError: not a map of finite numbers; fewer parts than 1.
    """
    heat = np.asarray(heat, dtype=np.float64)
    if heat.ndim != 2 or not heat.size or not np.isfinite(heat).all():
        raise ValueError(f"regions: heat must be a map (Y, X) of finite numbers, got shape {heat.shape}")
    if most < 1:
        raise ValueError(f"regions: most must be at least 1, got most={most}")
    positive = heat.clip(0)
    if positive.sum() == 0:
        return []
    shares = _on_raster(_on_raster(positive, 0), 1) / positive.sum()
    found: list[Region] = []
    free = np.ones((_RASTER, _RASTER), dtype=bool)
    while len(found) < most:
        best = max(
            (part for part in PARTS if free[part.rows, part.columns].all()),
            key=lambda part: (round(float(shares[part.rows, part.columns].sum()) - part.area, 9), -part.area),
            default=None,
        )
        if best is None:
            break
        share = float(shares[best.rows, best.columns].sum())
        if share - best.area < LEAST_EXCESS:
            break
        free[best.rows, best.columns] = False
        found.append(Region(best.name, share, best.area))
    return found


def verbalize_regions(heat: Float[NDArray[Any], "Y X"], *, most: int = 2) -> str:
    """Where on a picture the relevance lies, such as "upper left quarter, 41 % of the relevance on 25 % of the area".

    Raises:
        ValueError: as `regions`.
    """
    found = regions(heat, most=most)
    if not found:
        return "no part of the picture stands out"
    first, *others = found
    told = [f"{first.name}, {100 * first.share:.0f} % of the relevance on {100 * first.area:.0f} % of the area"]
    return "; ".join([*told, *(f"{part.name}, {100 * part.share:.0f} % on {100 * part.area:.0f} %" for part in others)])


class _Part(NamedTuple):
    name: str
    rows: slice
    columns: slice

    @property
    def area(self) -> float:
        return (self.rows.stop - self.rows.start) * (self.columns.stop - self.columns.start) / _RASTER**2


def _parts() -> tuple[_Part, ...]:
    every = slice(0, _RASTER)
    third, half = ([slice(n * step, (n + 1) * step) for n in range(_RASTER // step)] for step in (2, 3))
    vertical, horizontal = ("upper", "lower"), ("left", "right")
    found = [
        *(_Part(f"{name} half", half[n], every) for n, name in enumerate(vertical)),
        *(_Part(f"{name} half", every, half[n]) for n, name in enumerate(horizontal)),
        *(
            _Part(f"{y} {x} quarter", half[r], half[c])
            for r, y in enumerate(vertical)
            for c, x in enumerate(horizontal)
        ),
        *(_Part(name, third[n], every) for n, name in enumerate(("upper third", "middle band", "lower third"))),
        *(_Part(name, every, third[n]) for n, name in enumerate(("left third", "middle column", "right third"))),
    ]
    names = ("upper left corner", "upper edge", "upper right corner", "left edge", "center", "right edge",
             "lower left corner", "lower edge", "lower right corner")  # fmt: skip
    return (*found, *(_Part(name, third[n // 3], third[n % 3]) for n, name in enumerate(names)))


PARTS = _parts()


def _on_raster(x: NDArray[Any], axis: int) -> NDArray[Any]:
    """Sums over equal parts of an axis; a row that two parts share counts for either by its share."""
    total = np.concatenate([np.zeros_like(x.take([0], axis)), x.cumsum(axis)], axis)
    at = np.linspace(0, x.shape[axis], _RASTER + 1)
    below = np.minimum(at.astype(int), x.shape[axis] - 1)
    part = (at - below).reshape([-1 if n == axis else 1 for n in range(x.ndim)])
    cumulated = total.take(below, axis) + part * x.take(below, axis)
    return np.diff(cumulated, axis=axis)


def _checked(attributions: Attributions, caller: str) -> NDArray[Any]:
    try:
        a = np.asarray(attributions, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        a = np.empty((0, 0))
    if a.ndim != 1 or not np.isfinite(a).all():
        raise ValueError(f"{caller}: attributions must be one list of finite numbers, got shape {a.shape}")
    return a


def _check_options(kind: str, width: int, metric: str, sign: str | None) -> None:
    known = {"kind": (kind, get_args(Search)), "metric": (metric, METRICS), "sign": (sign, (None, "+", "-"))}
    for name, (given, choices) in known.items():
        if given not in choices:
            raise ValueError(f"search: {name} must be one of {', '.join(map(repr, choices))}, got {name}={given!r}")
    if not 3 <= width <= MAX_WIDTH:
        raise ValueError(f"search: width must lie in 3 … {MAX_WIDTH}, got width={width}")


def _mean(a: NDArray[Any], official: bool) -> float:
    """Officially one addend after the other: candidates as high as the threshold hang on the last bit."""
    if official:
        return float(sum(a.tolist()) / len(a))
    return round(float(a.mean()), 12)  # here they are as high, hence not above it


def _threshold(a: NDArray[Any], metric: Metric, value: float, official: bool) -> float:
    if metric == "mean":
        top = np.sort(a)[::-1][: max(int(len(a) * value), 1)]
        return _mean(top, official)
    variance = float(((a - a.mean()) ** 2).sum()) / len(a)
    return value * (variance**0.5 if metric == "quantile" else variance)


def _consistent(window: NDArray[Any], mask: list[int], sign: str, official: bool) -> bool:
    if not official or sign == "+":
        return bool((window[mask] >= 0).all())
    return len(mask) == len(window) and bool((window < 0).all())


def _trimmed(run: list[int], a: NDArray[Any]) -> list[int]:
    """Without the tokens at its ends that carry nothing."""
    carrying = [n for n in run if a[n] > 0]
    return list(range(carrying[0], carrying[-1] + 1))


def _coverage(a: NDArray[Any], indices: Sequence[int], official: bool) -> float:
    """Of ``indices``; officially, of the slice from the first to before the last."""
    positive = float(a.clip(0).sum())
    if positive == 0:
        return 0.0
    covered = a[indices[0] : indices[-1]] if official else a[list(indices)]
    return max(float(covered.sum()) / positive, 0.0)
