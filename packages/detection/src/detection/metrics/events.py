"""Measures of events in time: AR@AN and its area for proposals, mAP at overlaps for detections.

The numbers equal those of ActivityNet's evaluators (``Evaluation/eval_proposal.py`` and ``eval_detection.py`` of
https://github.com/activitynet/ActivityNet, MIT), beside which they were run; ours read no files, need no pandas, and
take videos without a proposal. Segments are (start, end) in seconds. Checked in: ``metrics/test_events.py``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_core.engine import Metric

Array = NDArray[np.float64]
TIOUS = tuple(0.5 + 0.05 * step for step in range(10))  # ActivityNet
THUMOS = (0.3, 0.4, 0.5, 0.6, 0.7)


@dataclass
class Events:
    """Segments of one video.

    Attributes:
        segments: (N, 2) start and end in seconds. scores: (N,), of what was found. labels: (N,) class numbers.
    """

    segments: Array
    scores: Array = field(default_factory=lambda: np.zeros(0))
    labels: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


def overlaps(one: Array, other: Array) -> Array:
    """(N, 2) and (M, 2) → (N, M): intersection over union in time."""
    start = np.maximum(one[:, None, 0], other[None, :, 0])
    end = np.minimum(one[:, None, 1], other[None, :, 1])
    both = (end - start).clip(0)
    return both / ((one[:, 1] - one[:, 0])[:, None] + (other[:, 1] - other[:, 0])[None] - both)


def soft_nms(
    found: Events, *, alpha: float = 0.4, low: float = 0.5, high: float = 0.9, duration: float = 1.0, count: int = 100
) -> Events:
    """The best proposals, where each that is taken lowers the scores of those it overlaps: Gaussian soft-NMS of BMN.

    Args:
        alpha: width of the Gaussian; the score of another is multiplied by exp(−overlap² / alpha).
        low, high: overlap from which that happens, for a proposal of no length and for one of the whole ``duration``.
        count: how many are taken.
    """
    scores = found.scores.astype(np.float64).copy()
    left = np.ones(len(scores), bool)
    taken: list[int] = []
    kept: list[float] = []
    while left.any() and len(taken) < count:
        best = int(np.where(left, scores, -np.inf).argmax())
        taken.append(best)
        kept.append(float(scores[best]))
        left[best] = False
        width = (found.segments[best, 1] - found.segments[best, 0]) / duration
        shared = overlaps(found.segments, found.segments[best : best + 1])[:, 0]
        near = left & (shared > low + (high - low) * width)
        scores[near] *= np.exp(-np.square(shared[near]) / alpha)
    labels = found.labels[taken] if len(found.labels) else found.labels
    return Events(found.segments[taken], np.array(kept), labels)


def average_recall(
    truth: Mapping[str, Events], found: Mapping[str, Events], *, tious: Sequence[float] = TIOUS, most: float = 100
) -> tuple[Array, Array]:
    """Recall at each overlap by the average number of proposals: (overlaps, 100), and the 100 numbers.

    Each video gives the same share of its proposals, so that the average over videos with truth is 1 %, 2 % … of
    ``most``. Where there are no proposals at all, recall is 0.
    """
    videos = [name for name, own in truth.items() if len(own.segments)]
    total = sum(len(own.segments) for own in found.values())
    if not videos or not total:
        return np.zeros((len(tious), 100)), np.arange(1, 101) / 100 * most
    ratio = most * len(videos) / total
    shared, retrieved = [], 0
    for name in videos:
        own = found.get(name)
        if own is None or not len(own.segments):
            shared.append(np.zeros((len(truth[name].segments), 1)))
            continue
        order = own.scores.argsort()[::-1]
        order = order[: min(int(len(order) * ratio), len(order))]
        retrieved += len(order)
        shared.append(overlaps(truth[name].segments, own.segments[order]))
    if not retrieved:
        return np.zeros((len(tious), 100)), np.arange(1, 101) / 100 * most
    parts = np.arange(1, 101) / 100.0 * (most * float(len(videos)) / retrieved)
    recall = np.empty((len(tious), 100))
    for row, tiou in enumerate(tious):
        hits = np.zeros(100)
        for own in shared:
            counts = np.minimum((own.shape[1] * parts).astype(int), own.shape[1])
            reached = np.maximum.accumulate(own >= tiou, axis=1)
            hits += np.concatenate([np.zeros(1), reached.sum(0)])[counts]
        recall[row] = hits / sum(len(own) for own in shared)
    return recall, parts * (float(retrieved) / len(videos))


def average_precision(
    truth: Mapping[str, Events], found: Mapping[str, Events], label: int, *, tious: Sequence[float] = TIOUS
) -> Array:
    """Interpolated average precision of one class at each overlap; each event is found once, by the best score."""
    own = {name: events.segments[events.labels == label] for name, events in truth.items()}
    rows = [(name, i) for name, events in found.items() for i in np.flatnonzero(events.labels == label)]
    count = sum(map(len, own.values()))
    if not rows or not count:
        return np.zeros(len(tious))
    scores = np.array([found[name].scores[i] for name, i in rows])
    hits = np.zeros((len(tious), len(rows)))
    free = {name: np.ones((len(tious), len(segments)), bool) for name, segments in own.items()}
    for place, row in enumerate(scores.argsort()[::-1]):
        name, i = rows[row]
        if not len(own.get(name, ())):
            continue
        shared = overlaps(own[name], found[name].segments[i : i + 1])[:, 0]
        order = shared.argsort()[::-1]
        for number, tiou in enumerate(tious):
            for j in order:
                if shared[j] < tiou:
                    break
                if free[name][number, j]:
                    free[name][number, j] = False
                    hits[number, place] = 1
                    break
    reached = hits.cumsum(1)
    return np.array([_interpolated(own / np.arange(1, len(rows) + 1), own / count) for own in reached])


def _interpolated(precision: Array, recall: Array) -> float:
    """Area under the highest precision at each recall or more."""
    precision = np.maximum.accumulate(np.concatenate([[0], precision, [0]])[::-1])[::-1]
    recall = np.concatenate([[0], recall, [1]])
    steps = np.flatnonzero(recall[1:] != recall[:-1]) + 1
    return float(((recall[steps] - recall[steps - 1]) * precision[steps]).sum())


class EventScores(Metric):
    """``AR@1``, ``AR@5``, ``AR@10``, ``AR@100``, ``AUC`` of proposals, and ``mAP``, ``mAP@<overlap>`` of their classes.

    Windows of one video are joined before soft-NMS, so its proposals compete.

    Args:
        tious: overlaps of mAP; recall has ActivityNet's.
        alpha, low, high, count: of `soft_nms`.
    """

    def __init__(
        self,
        tious: Sequence[float] = TIOUS,
        *,
        alpha: float = 0.4,
        low: float = 0.5,
        high: float = 0.9,
        count: int = 100,
    ) -> None:
        super().__init__()
        if not tious or not all(0 < tiou <= 1 for tiou in tious):
            raise ValueError(f"EventScores: tious must be numbers in (0, 1], got tious={tious}")
        if alpha <= 0 or count < 1:
            raise ValueError(f"EventScores: alpha must be above 0, count at least 1, got alpha={alpha}, count={count}")
        self.tious, self.nms = tuple(tious), {"alpha": alpha, "low": low, "high": high, "count": count}

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:  # noqa: ARG002  mmengine's signature
        """Keep what `detection.tasks.events.EventTask.predict` gives."""
        self.results.extend(data_samples)

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Over all videos of all processes."""
        truth: dict[str, Events] = {}
        windows: dict[str, list[dict[str, Any]]] = {}
        for one in results:
            truth[one["video"]] = one["truth"]
            windows.setdefault(one["video"], []).append(one)
        found = {name: join_windows(own, **self.nms) for name, own in windows.items()}
        recall, _ = average_recall(truth, found)
        mean = recall.mean(0)
        scores = {f"AR@{number}": float(mean[number - 1]) for number in (1, 5, 10, 100)}
        counts = np.arange(1, 101) / 100
        scores["AUC"] = float((np.diff(counts) * (mean[1:] + mean[:-1]) / 2).sum())
        labels = sorted({int(label) for own in truth.values() for label in own.labels})
        precision = np.array([average_precision(truth, found, label, tious=self.tious) for label in labels])
        if len(labels):
            scores["mAP"] = float(precision.mean())
            scores |= {f"mAP@{tiou:.2f}": float(own) for tiou, own in zip(self.tious, precision.mean(0), strict=True)}
        return scores


def join_windows(windows: Sequence[Mapping[str, Any]], **options: Any) -> Events:
    """Proposals of all windows of one video after `soft_nms`."""
    own = [one["found"] for one in windows]
    joined = Events(*(np.concatenate([getattr(e, name) for e in own]) for name in ("segments", "scores", "labels")))
    return soft_nms(joined, duration=windows[0]["duration"], **options)
