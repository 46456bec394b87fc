"""Searches against the official ones written out in loops, what the repairs change, words, regions; refusals."""

import itertools
from typing import Any

import numpy as np
import pytest

from vlm_tools.readings.verbalization import (
    PARTS,
    Candidate,
    Span,
    joined,
    masks,
    regions,
    search,
    summary,
    total_order,
    verbalize,
    verbalize_regions,
)


def official_search(a: list[float], width: int, ones: Any, threshold: float) -> list[tuple[int, ...]]:
    """Every mask of the given numbers of ones on every window but the last, by lists of zeros and ones."""
    found = set()
    for mask in itertools.product((0, 1), repeat=width):
        for start in range(len(a) - width):
            covered = [x for x, one in zip(a[start:], mask, strict=False) if one]
            if ones(mask) and sum(covered) / len(covered) > threshold:
                found.add(tuple(start + n for n, one in enumerate(mask) if one))
    return sorted(found, reverse=True)


CENTERED = {(0, 1, 1, 1, 0), (1, 1, 1, 1, 1)}


@pytest.mark.parametrize("metric", ["mean", "quantile", "variance"])
def test_official_searches_find_what_their_loops_find(metric: Any) -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        a = rng.normal(size=14)
        a = a / a.max()
        value = 0.4 if metric == "mean" else 0.8
        top = np.sort(a)[::-1][:5].mean()
        threshold = {"mean": top, "quantile": 0.8 * a.std(), "variance": 0.8 * a.var()}[metric]
        options: dict[str, Any] = {"metric": metric, "value": value, "official": True}
        loose = official_search(a.tolist(), 5, lambda mask: sum(mask) in (2, 3), threshold)
        assert [c.indices for c in search(a, "convolution", **options)] == loose
        spans = official_search(a.tolist(), 5, lambda mask: mask in CENTERED, threshold)
        found = search(a, "span", **options)
        assert [c.indices for c in found] == spans
        assert all(c.score == pytest.approx(a[list(c.indices)].mean(), abs=1e-6) for c in found)


def test_masks_are_as_many_as_published() -> None:
    assert len(masks("convolution", 5)) == 20
    assert masks("span", 5) == [[1, 2, 3], [0, 1, 2, 3, 4]]
    ones = [sum(mask) for mask in itertools.product((0, 1), repeat=12)]
    assert len(masks("convolution", 12)) == sum(1 < count < 11 for count in ones)


END = [0.0, 0.1, 0.0, -0.2, 0.0, 0.1, 0.0, 0.9, 0.8]


def test_repaired_windows_reach_the_end_and_coverage_counts_the_last_token() -> None:
    assert all(8 not in c.indices for c in search(END, "convolution", official=True))
    assert Candidate((7, 8), pytest.approx(0.85 / 0.9)) in search(END, "convolution")  # type: ignore[arg-type]
    assert summary(END) == [Span(7, 8, pytest.approx(1.7 / 1.9))]  # type: ignore[comparison-overlap]
    # Officially the total order names tokens 0 to 4, whatever they say.
    assert summary(END, official=True)[-1].first == 0
    assert summary([0.0] * 7 + [1.0])[0] == Span(7, 7, 1.0)


def test_the_sign_asks_for_or_against_the_prediction() -> None:
    a = [-0.9, -0.8, 0.3, -0.1, 0.5, 0.6, -0.2, 0.1]
    assert {c.indices for c in search(a, "convolution", sign="-")} >= {(0, 1)}
    assert all(a[n] >= 0 for c in search(a, "convolution", sign="+") for n in c.indices)
    assert any(a[n] < 0 for c in search(a, "convolution", metric="variance", value=0.1) for n in c.indices)
    assert search(a, "convolution", sign="-", official=True) == []
    assert summary(a, sign="-")[0] == Span(0, 1, pytest.approx(1.7 / 2.0))  # type: ignore[comparison-overlap]


def test_width_metric_and_value_count() -> None:
    rng = np.random.default_rng(1)
    a = rng.random(20).tolist()
    base = search(a, "convolution")
    assert search(a, "convolution", width=6) != base
    assert len(search(a, "convolution", value=0.1)) < len(base) < len(search(a, "convolution", value=0.9))
    assert search(a, "convolution", metric="quantile") != base
    assert search(a, "span", width=6) == search(a, "span", width=5)  # a run around the middle needs one
    assert summary(a, width=7) != summary(a)


def test_texts_without_relevance_and_short_ones_are_no_error() -> None:
    assert search([], "span") == search([0.0] * 9, "convolution") == []
    assert summary([]) == summary([0.0, 0.0]) == summary([-1.0, -2.0]) == []
    assert summary([0.2]) == [Span(0, 0, 1.0)]
    assert summary([0.1, 0.9])[0] == Span(0, 1, 1.0)
    assert verbalize([], []) == "No word stands out."
    assert total_order([1.0, -1.0, 3.0]) == [(2, 0.75), (0, 0.25), (1, -0.25)]
    assert total_order([-1.0]) == [(0, 0.0)]


def test_words_are_read_from_the_pieces_of_three_tokenizers() -> None:
    assert joined(["<s>", "Ġun", "believ", "able", "Ġfilm"]) == "unbelievable film"
    assert joined(["▁un", "believable", "▁film", "</s>"]) == "unbelievable film"
    assert joined(["[CLS]", "un", "##believable", "film"]) == "unbelievable film"
    tokens = ["a", "truly", "great", "film", "in", "every", "way", "and", "fun"]
    told = verbalize(tokens, [0, 0.5, 0.9, 0.05, 0, 0, 0, 0, 0.3])
    assert told.startswith('Most relevant: "truly great')
    assert told.endswith("%).")
    against = verbalize(tokens, [0, -0.5, -0.9, 0, 0, 0, 0, 0, 0], sign="-")
    assert against == 'Most against it: "truly great" (100 %).'
    assert verbalize(["<s>", "</s>"], [1.0, 0.5]) == "No word stands out."
    assert verbalize(tokens, END, official=True) != verbalize(tokens, END)


def spot(rows: slice, columns: slice, shape: tuple[int, int] = (12, 12)) -> np.ndarray[Any, Any]:
    heat = np.full(shape, 0.01)
    heat[rows, columns] = 1.0
    return heat


def test_regions_are_named_by_relevance_beyond_their_area() -> None:
    assert regions(spot(slice(0, 6), slice(0, 6)))[0].name == "upper left quarter"
    assert regions(spot(slice(4, 8), slice(4, 8)))[0].name == "center"
    assert regions(spot(slice(8, 12), slice(0, 12)))[0].name == "lower third"
    assert regions(spot(slice(0, 12), slice(6, 12)))[0].name == "right half"
    (found,) = regions(spot(slice(0, 4), slice(8, 12)), most=1)
    assert (found.name, found.area) == ("upper right corner", pytest.approx(1 / 9))
    assert found.share == pytest.approx(16 / (16 + 1.28))
    two = spot(slice(0, 4), slice(0, 4)) + spot(slice(8, 12), slice(8, 12)) * 0.9
    assert [part.name for part in regions(two)] == ["upper left corner", "lower right corner"]
    assert len(regions(two, most=1)) == 1
    assert verbalize_regions(two).startswith("upper left corner, ")
    assert "; lower right corner, " in verbalize_regions(two)
    assert (
        verbalize_regions(np.ones((5, 7)))
        == verbalize_regions(-np.ones((3, 3)))
        == ("no part of the picture stands out")
    )


def test_a_map_of_any_size_is_read_by_area() -> None:
    for shape in ((1, 1), (4, 4), (7, 5), (24, 24)):
        heat = np.random.default_rng(0).random(shape)
        heat[: (shape[0] + 1) // 2] += 5.0
        coarse, fine = regions(heat), regions(heat.repeat(6, 0).repeat(6, 1))
        assert [part.name for part in coarse] == [part.name for part in fine]
        assert [part.share for part in coarse] == pytest.approx([part.share for part in fine])
    assert sum(part.area for part in PARTS if "quarter" in part.name) == pytest.approx(1)


def test_attributions_and_options_that_mean_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^verbalize: 1 tokens need as many attributions, got 2"):
        verbalize(["a"], [1.0, 2.0])
    for wrong in ([float("nan")], [[1.0]], ["a"], [10**400]):
        with pytest.raises(ValueError, match=r"^search: attributions must be one list of finite numbers"):
            search(wrong, "span")  # type: ignore[arg-type]
    for options, message in (
        ({"kind": "total"}, "kind must be one of 'convolution', 'span', got kind='total'"),
        ({"metric": "median"}, "metric must be one of"),
        ({"sign": "0"}, "sign must be one of None"),
        ({"width": 13}, "width must lie in 3 … 12, got width=13"),
        ({"width": 2}, "width must lie in 3"),
        ({"value": 1.5}, "value must be positive, and at most 1 for the mean, got value=1.5"),
        ({"value": 0.0, "metric": "variance"}, "value must be positive"),
    ):
        with pytest.raises(ValueError, match=f"^search: {message}"):
            search([1.0] * 9, **{"kind": "span", **options})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^regions: heat must be a map \(Y, X\) of finite numbers, got shape \(3,\)"):
        regions(np.ones(3))
    with pytest.raises(ValueError, match=r"^regions: most must be at least 1, got most=0"):
        regions(np.ones((3, 3)), most=0)
