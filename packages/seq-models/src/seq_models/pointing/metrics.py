"""Scores of Pointer Networks."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from attn_core.engine import Metric
from seq_models.pointing.geometry import is_simple_polygon, polygon_area, tour_lengths

TOO_MANY_INVALID = 0.01


class _BatchMetric(Metric):
    """A metric whose data set has batches as items.

    mmengine keeps as many results as the data set has items: so one result is a whole batch, not a sample.
    """

    @abstractmethod
    def score(self, sample: dict[str, Any]) -> Any:
        """What is kept of a sample."""

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:  # noqa: ARG002  mmengine's signature
        self.results.append([self.score(sample) for sample in data_samples])

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        return self.summary([row for batch in results for row in batch])

    @abstractmethod
    def summary(self, rows: list[Any]) -> dict[str, float]:
        """The metrics of all samples."""


class HullScore(_BatchMetric):
    """``exact``: share of hulls equal up to rotation; ``area``: mean share of the true area.

    ``area`` is taken over answers that are simple polygons; ``invalid`` is the share of the others, and with more than
    1 % of them the paper calls the area a failure, here NaN.

    Source: Vinyals et al. 2015, section 4.2.
    """

    def score(self, sample: dict[str, Any]) -> Any:
        """Whether the hull is exact, and its share of the true area (None: not a simple polygon)."""
        points = sample["points"]
        area = None
        if same_cycle(sample["pointers"], sample["truth"]):
            area = 1.0
        elif is_simple_polygon(corners := points[torch.tensor(sample["pointers"], dtype=torch.long) - 1]):
            whole = abs(polygon_area(points[torch.tensor(sample["truth"]) - 1]))
            area = abs(polygon_area(corners)) / whole if whole else 1.0
        return (same_cycle(sample["pointers"], sample["truth"]), area)

    def summary(self, rows: list[Any]) -> dict[str, float]:
        """``exact``, ``area`` and ``invalid``, all in [0, 1]; ``area`` is NaN where too many are invalid."""
        areas = [area for _, area in rows if area is not None]
        invalid = 1 - len(areas) / len(rows)
        mean = sum(areas) / len(areas) if invalid <= TOO_MANY_INVALID else float("nan")
        return {"exact": sum(hit for hit, _ in rows) / len(rows), "area": mean, "invalid": invalid}


class DelaunayScore(_BatchMetric):
    """``exact``: share of triangulations with all triangles right and no other; ``triangles``: share of true triangles
    that are found. Order of triangles and of corners does not count.

    Source: Vinyals et al. 2015, section 4.3.
    """

    def score(self, sample: dict[str, Any]) -> Any:
        """Whether all triangles are right, how many are, and how many there should be."""
        found, truth = triangles(sample["pointers"]), triangles(sample["truth"])
        whole = len(sample["pointers"]) % 3 == 0
        return (whole and found == truth, len(found & truth), len(truth))

    def summary(self, rows: list[Any]) -> dict[str, float]:
        """``exact`` and ``triangles``, both in [0, 1]."""
        hits, found, total = (sum(column) for column in zip(*rows, strict=True))
        return {"exact": hits / len(rows), "triangles": found / total}


class TourScore(_BatchMetric):
    """``ratio``: mean length over mean length of the teacher's tours; ``length``, ``teacher_length``: the means;
    ``invalid``: share of answers that do not visit every city once, which the means leave out.
    """

    def score(self, sample: dict[str, Any]) -> Any:
        """Whether the tour visits each city once, its length and the teacher's (0 where it does not)."""
        count = len(sample["points"])
        valid = sorted(sample["pointers"]) == list(range(1, count + 1))
        lengths = (0.0, 0.0)
        if valid:
            tours = torch.tensor([sample["pointers"], sample["truth"]]) - 1
            lengths = tuple(tour_lengths(sample["points"].expand(2, -1, -1), tours).tolist())
        return (valid, *lengths)

    def summary(self, rows: list[Any]) -> dict[str, float]:
        """Mean lengths over valid tours and their ``ratio`` (NaN without one), and the share ``invalid``."""
        valid, own, teacher = (sum(column) for column in zip(*rows, strict=True))
        if not valid:
            return dict.fromkeys(("ratio", "length", "teacher_length"), float("nan")) | {"invalid": 1.0}
        means = {"ratio": own / teacher, "length": own / valid, "teacher_length": teacher / valid}
        return means | {"invalid": 1 - valid / len(rows)}


def same_cycle(answer: Sequence[int], truth: Sequence[int]) -> bool:
    """Whether two closed sequences are equal up to where they start."""
    if len(answer) != len(truth) or set(answer) != set(truth):
        return False
    start = list(answer).index(truth[0]) if truth else 0
    return [*answer[start:], *answer[:start]] == list(truth)


def triangles(pointers: Sequence[int]) -> set[frozenset[int]]:
    """The complete triangles of a sequence."""
    return {frozenset(pointers[i : i + 3]) for i in range(0, len(pointers) - 2, 3)}
