"""AR@AN, mAP at overlaps and soft-NMS beside plain definitions; the official evaluators gave these numbers, too."""

import math
from typing import Any

import numpy as np
import pytest

from detection.metrics.events import (
    THUMOS,
    TIOUS,
    Array,
    Events,
    EventScores,
    average_precision,
    average_recall,
    join_windows,
    overlaps,
    soft_nms,
)


def some(seed: int) -> tuple[dict[str, Events], dict[str, Events]]:
    """Truth and proposals of six videos; half of the proposals lie near an event."""
    random = np.random.RandomState(seed)
    truth, found = {}, {}
    for video in "abcdef":
        count, many = random.randint(1, 5), random.randint(4, 60)
        own = np.sort(random.rand(count, 2) * 50, 1)
        near = own[random.randint(0, count, many // 2)] + random.randn(many // 2, 2)
        segments = np.sort(np.concatenate([near, random.rand(many - many // 2, 2) * 50]), 1)
        truth[video] = Events(own, labels=random.randint(0, 2, count))
        found[video] = Events(segments, random.rand(many), random.randint(0, 2, many))
    return truth, found


def tiou(one: Array, other: Array) -> float:
    both = max(0.0, min(one[1], other[1]) - max(one[0], other[0]))
    return both / ((one[1] - one[0]) + (other[1] - other[0]) - both)


def test_overlaps_are_shares_of_the_union() -> None:
    one, other = np.array([[0.0, 4.0], [1.0, 2.0]]), np.array([[2.0, 6.0], [5.0, 6.0], [0.0, 4.0]])
    expected = [[2 / 6, 0, 1], [0, 0, 1 / 4]]
    assert overlaps(one, other).tolist() == pytest.approx(np.array(expected))


@pytest.mark.parametrize("most", [100, 5.0])
def test_recall_equals_a_count_over_videos(most: float) -> None:
    truth, found = some(0)
    recall, numbers = average_recall(truth, found, most=most)
    total = sum(len(own.segments) for own in found.values())
    ratio = most * len(truth) / total
    kept = {v: min(int(len(own.segments) * ratio), len(own.segments)) for v, own in found.items()}
    for step in (0, 9, 40, 99):
        share = (step + 1) / 100 * (most * len(truth) / sum(kept.values()))
        for row in (0, 5, 9):
            hits = count = 0
            for video, own in found.items():
                best = sorted(range(len(own.scores)), key=lambda i: -own.scores[i])[: kept[video]]
                best = best[: min(int(kept[video] * share), kept[video])]
                count += len(truth[video].segments)
                hits += sum(any(tiou(t, own.segments[i]) >= TIOUS[row] for i in best) for t in truth[video].segments)
            assert recall[row, step] == pytest.approx(hits / count)
        assert numbers[step] == pytest.approx(share * sum(kept.values()) / len(truth))


def test_recall_of_known_proposals() -> None:
    truth = {
        "a": Events(np.array([[0.0, 10.0], [20.0, 30.0]])),
        "b": Events(np.array([[5.0, 6.0]])),
        "c": Events(np.zeros((0, 2))),
    }
    found = {"a": Events(np.array([[0.0, 10.0]] + [[40.0, 50.0]] * 98 + [[20.0, 30.0]]), np.linspace(1, 0, 100))}
    recall, _ = average_recall(truth, found, most=50)  # a gives all 100 of its own, b has none
    assert recall[:, 0].tolist() == pytest.approx([1 / 3] * 10)
    assert recall[:, 98].tolist() == pytest.approx([1 / 3] * 10)
    assert recall[:, 99].tolist() == pytest.approx([2 / 3] * 10)
    assert average_recall(truth, {})[0].max() == average_recall({}, found)[0].max() == 0


def plain_precision(truth: dict[str, Events], found: dict[str, Events], label: int, wanted: float) -> float:
    """Greedy by score, each event found once; then the area under the highest precision to the right."""
    rows = [
        (own.scores[i], v, own.segments[i]) for v, own in found.items() for i in np.flatnonzero(own.labels == label)
    ]
    events = {v: own.segments[own.labels == label] for v, own in truth.items()}
    used: set[tuple[str, int]] = set()
    hits = []
    for _, video, segment in sorted(rows, key=lambda row: -row[0]):
        fits = sorted(((tiou(segment, e), j) for j, e in enumerate(events[video])), reverse=True)
        place = next((j for share, j in fits if share >= wanted and (video, j) not in used), None)
        hits.append(place is not None)
        if place is not None:
            used.add((video, place))
    count = sum(map(len, events.values()))
    precisions = [sum(hits[: k + 1]) / (k + 1) for k in range(len(hits))]
    return sum(max(precisions[k:]) / count for k, hit in enumerate(hits) if hit)


def test_precision_equals_a_plain_definition() -> None:
    for seed in range(3):
        truth, found = some(seed)
        for label in (0, 1):
            ours = average_precision(truth, found, label, tious=THUMOS)
            expected = [plain_precision(truth, found, label, wanted) for wanted in THUMOS]
            assert ours.tolist() == pytest.approx(expected)
            assert ours[0] > 0
    assert average_precision(*some(0), 7).tolist() == [0] * 10


def test_soft_nms_lowers_what_overlaps_the_taken_and_counts_width() -> None:
    random = np.random.RandomState(0)
    found = Events(np.sort(random.rand(40, 2), 1) * 20, random.rand(40), np.arange(40))
    options: dict[str, float] = {"alpha": 0.4, "low": 0.3, "high": 0.8}
    ours = soft_nms(found, duration=20, count=12, **options)  # pyright: ignore[reportArgumentType]
    scores = dict(enumerate(found.scores.tolist()))
    expected = []
    for _ in range(12):
        best = max(scores, key=lambda i: scores[i])
        expected.append((best, scores.pop(best)))
        own = found.segments[best]
        for i in scores:
            share = tiou(found.segments[i], own)
            if share > 0.3 + 0.5 * (own[1] - own[0]) / 20:
                scores[i] *= math.exp(-(share**2) / 0.4)
    assert ours.labels.tolist() == [place for place, _ in expected]
    assert ours.scores.tolist() == pytest.approx([score for _, score in expected])
    assert ours.segments.tolist() == found.segments[ours.labels].tolist()
    assert len(soft_nms(found, count=100).scores) == 40
    assert len(soft_nms(Events(np.zeros((0, 2))), count=5).scores) == 0


def test_whoever_repeats_the_truth_scores_one_and_windows_compete() -> None:
    truth = {
        "a": Events(np.array([[1.0, 4.0]]), labels=np.array([2])),
        "b": Events(np.array([[0.0, 9.0]]), labels=np.array([0])),
    }
    rows: list[dict[str, Any]] = [
        {"video": v, "truth": own, "duration": 10.0, "found": Events(own.segments, np.ones(1), own.labels)}
        for v, own in truth.items()
    ]
    metric = EventScores()
    metric.process(None, rows)
    found = metric.compute_metrics(metric.results)
    assert found == pytest.approx(dict.fromkeys(found, 1.0) | {"AUC": 0.99})  # the curve begins at one proposal
    assert {"AR@1", "AR@100", "AUC", "mAP", "mAP@0.50", "mAP@0.95"} <= set(found)
    twice = [rows[0], {**rows[0], "found": Events(np.array([[1.0, 4.0]]), np.array([0.5]), np.array([2]))}]
    assert join_windows(twice).scores.tolist() == pytest.approx([1, 0.5 * math.exp(-1 / 0.4)])
    assert join_windows(twice, count=1).scores.tolist() == [1]
    assert set(EventScores(THUMOS, count=7, alpha=0.3, low=0.2, high=0.4).compute_metrics(rows)) >= {"mAP@0.30"}
    with pytest.raises(ValueError, match="tious must be numbers in"):
        EventScores((0.0,))
    with pytest.raises(ValueError, match="alpha must be above 0, count at least 1, got alpha=0, count=100"):
        EventScores(alpha=0)
