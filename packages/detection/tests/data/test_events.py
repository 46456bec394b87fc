"""Targets of BMN beside loops, and the generated videos."""

import hashlib
from itertools import pairwise

import numpy as np
import pytest
import torch

from detection.data.events import SPLITS, ClassStreams, collate_events, event_item, event_targets, make_video
from detection.metrics.events import Events


def test_targets_equal_the_published_loops() -> None:
    segments, steps = np.array([[0.12, 0.5], [0.55, 1.0]]), 8
    overlap, starts, ends = event_targets(segments, steps)
    for i in range(steps):
        low, high = (i - 0.5) / steps, (i + 0.5) / steps
        for column, found in ((0, starts), (1, ends)):
            edges = segments[:, column]
            shares = [max(0, min(high, e + 1.5 / steps) - max(low, e - 1.5 / steps)) * steps for e in edges]
            assert found[i].item() == pytest.approx(max(shares), abs=1e-6)
        for j in range(steps):
            start, end = i / steps, (j + 1) / steps
            best = 0.0
            for s, e in segments:
                both = max(0, min(e, end) - max(s, start))
                best = max(best, both / ((e - s) + (end - start) - both))
            assert overlap[i, j].item() == pytest.approx(best if j >= i else 0, abs=1e-6)
    assert all(not found.any() for found in event_targets(np.zeros((0, 2)), 5))
    point = event_targets(np.array([[0.5, 0.5], [-1.0, 3.0]]), 4)[0]  # no length; beyond the window
    assert point[0, 3] == 1
    assert point.isfinite().all()


def test_a_window_has_the_events_that_touch_it() -> None:
    truth = Events(np.array([[1.0, 3.0], [8.0, 12.0], [30.0, 31.0]]))
    item = event_item(torch.zeros(4, 10), truth, video="v", window=(5.0, 15.0), duration=40.0)
    alone = event_targets(np.array([[0.3, 0.7]]), 10)
    for name, expected in zip(("overlaps", "starts", "ends"), alone, strict=True):
        torch.testing.assert_close(item[name], expected)
    assert item["truth"] is truth


def test_videos_are_those_that_were_described() -> None:
    counts, hashed = [], hashlib.sha256()
    for index in range(40):
        scores, truth, duration = make_video(SPLITS["val"][1] + index)
        assert scores.shape == (16, 32)
        assert 0 <= scores.min() < scores.max() <= 1
        assert 40 <= duration <= 200
        assert (truth.segments[:, 1] > truth.segments[:, 0]).all()
        assert (truth.segments[1:, 0] > truth.segments[:-1, 1]).all()
        assert 0 < truth.segments.min() < truth.segments.max() < duration
        counts.append(len(truth.segments))
        hashed.update(np.round(truth.segments, 6).tobytes() + truth.labels.tobytes())
    assert (min(counts), max(counts)) == (1, 4)
    assert hashed.hexdigest()[:12] == "17b9454edacf"


def test_both_streams_fire_in_an_event_and_not_elsewhere() -> None:
    inside, outside = [], []
    for index in range(30):
        scores, truth, duration = make_video(21_000 + index)
        steps = (np.arange(32) + 0.5) / 32 * duration
        for (start, end), label in zip(truth.segments, truth.labels, strict=True):
            within = (steps > start) & (steps < end)
            both = scores[label] * scores[8 + label]
            inside.append(both[within].mean())
            outside.append(both[~within].mean())
    assert np.mean(inside) > 3 * np.mean(outside)


def test_splits_share_no_video_and_a_batch_stacks() -> None:
    assert [len(ClassStreams(split)) for split in ("train", "val", "test")] == [320, 100, 150]  # pyright: ignore[reportArgumentType]
    ranges = sorted((first, first + count) for count, first in SPLITS.values())
    assert all(one[1] <= other[0] for one, other in pairwise(ranges))
    data = ClassStreams("val", limit=3)
    assert len(data) == 3
    batch = collate_events([data[0], data[2]])
    assert batch["features"].shape == (2, 16, 32)
    assert batch["overlaps"].shape == (2, 32, 32)
    assert batch["video"] == ["val_0", "val_2"]
    with pytest.raises(IndexError):
        data[3]
    with pytest.raises(ValueError, match="split must be 'train', 'val' or 'test', got split='all'"):
        ClassStreams("all")  # pyright: ignore[reportArgumentType]
