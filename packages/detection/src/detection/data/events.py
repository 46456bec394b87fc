"""Events in time as BMN learns them, and ``class_streams``: generated videos of class scores.

``class_streams`` holds what two recognizers would say of a video: for each of 32 snippets the scores of eight classes,
by what they see (it fires as long as the place of an action is in view) and by how it moves (it fires while somebody
acts, and in the background, too). An event is where both agree on a class. 320 videos to train, 100 to validate, 150 to
test, each of one to four events, from `numpy.random.RandomState`. Checked in: ``data/test_events.py``.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from detection.metrics.events import Events

Array = NDArray[np.float64]
SPLITS = {"train": (320, 21_000), "val": (100, 22_000), "test": (150, 23_000)}  # videos, first seed
CLASSES = 8
STEPS = 32
BOUNDARY = 3  # steps that the truth of a start or an end is wide


def event_targets(segments: Array, steps: int) -> tuple[Float[Tensor, "T T"], Float[Tensor, " T"], Float[Tensor, " T"]]:
    """What BMN should give: overlaps of all pairs [start, end] with the truth, starts and ends.

    Args:
        segments: (N, 2), in shares of the window. As ``dataset.py`` of the official repository, also for N = 0.
    """
    segments = np.asarray(segments, np.float64).reshape(-1, 2).clip(0, 1)
    step = 1 / steps
    places = np.arange(steps) * step
    pairs = np.stack([np.repeat(places, steps), np.tile(places + step, steps)], 1)
    found = np.zeros((steps, steps))
    for start, end in segments:
        both = (np.minimum(pairs[:, 1], end) - np.maximum(pairs[:, 0], start)).clip(0)
        union = (pairs[:, 1] - pairs[:, 0]) - both + (end - start)
        found = np.maximum(
            found, np.divide(both, union, where=union > 0, out=np.zeros_like(both)).reshape(steps, steps)
        )
    marks = []
    for column in (0, 1):
        edge = segments[None, :, column]
        low, high = edge - BOUNDARY * step / 2, edge + BOUNDARY * step / 2
        anchor = places[:, None]  # each step's anchor is its place, half a step to either side
        both = (np.minimum(anchor + step / 2, high) - np.maximum(anchor - step / 2, low)).clip(0) / step
        marks.append(both.max(1, initial=0))
    # Official anchors end before they begin where start > end: those pairs are not asked for.
    starts, ends = (torch.from_numpy(mark).float() for mark in marks)
    return torch.from_numpy(np.triu(found)).float(), starts, ends


def event_item(
    features: Float[Tensor, "F T"], truth: Events, *, video: str, window: tuple[float, float], duration: float
) -> dict[str, Any]:
    """What a data set of windows gives for one: features and targets, and whose they are.

    Args:
        truth: of the whole video, in seconds. window: its start and end in seconds. duration: of the video.
    """
    start, end = window
    own = truth.segments[(truth.segments[:, 1] > start) & (truth.segments[:, 0] < end)]
    overlap, starts, ends = event_targets((own - start) / (end - start), features.shape[1])
    return {
        "features": features,
        "overlaps": overlap,
        "starts": starts,
        "ends": ends,
        "truth": truth,
        "video": video,
        "window": window,
        "duration": duration,
    }


def collate_events(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Tensors stacked, the rest as lists."""
    return {
        name: torch.stack([item[name] for item in items]) if isinstance(items[0][name], Tensor) else [
            item[name] for item in items
        ]
        for name in items[0]
    }  # fmt: skip


class ClassStreams(Dataset[dict[str, Any]]):
    """One split of ``class_streams``; features are (16, 32): eight scores of what is seen, eight of what moves.

    Args:
        split: ``"val"`` serves every choice, ``"test"`` the final number only. limit: use only the first videos.

    Raises: ValueError for an unknown split.
    """

    def __init__(self, split: Literal["train", "val", "test"] = "train", *, limit: int | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"ClassStreams: split must be 'train', 'val' or 'test', got split={split!r}")
        self.split = split
        self.count = min(SPLITS[split][0], limit if limit is not None else SPLITS[split][0])
        self.metainfo: dict[str, Any] = {"classes": [f"action {number}" for number in range(CLASSES)], "steps": STEPS}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        scores, truth, duration = make_video(SPLITS[self.split][1] + index)
        features = torch.from_numpy(scores).float()
        name = f"{self.split}_{index}"
        return event_item(features, truth, video=name, window=(0.0, duration), duration=duration)


def make_video(seed: int) -> tuple[Array, Events, float]:
    """Scores (16, 32) in [0, 1], the events, and the length in seconds."""
    random = np.random.RandomState(seed)
    duration = 40 + 160 * random.random_sample()
    main = random.randint(CLASSES)
    events: list[tuple[float, float, int]] = []
    for _ in range(random.randint(1, 5)):
        for _ in range(20):
            length = 0.09 * (0.5 / 0.09) ** random.random_sample()
            start = 0.01 + (0.96 - length) * random.random_sample()
            if all(start > other[1] + 0.04 or start + length < other[0] - 0.04 for other in events):
                label = main if random.random_sample() < 0.75 else random.randint(CLASSES)
                events.append((start, start + length, label))
                break
    seen, moves = (_noise(random, 0.7) - 2.2 for _ in range(2))
    for start, end, label in events:
        before, after = 0.15 * random.random_sample(2)
        seen[label] = np.maximum(seen[label], 4.5 * _share(start - before, end + after) + seen[label] * 0.5 - 1.1)
        moves[label] += (2.5 + 1.5 * random.random_sample()) * _share(start, end)
    for _ in range(random.randint(2, 6)):  # movements in the background
        start, length = random.random_sample(), 0.03 + 0.2 * random.random_sample()
        moves[random.randint(CLASSES)] += 3.5 * _share(start, start + length)
    scores = 1 / (1 + np.exp(-np.concatenate([seen, moves])))
    events.sort()
    segments = np.array([event[:2] for event in events]) * duration
    return scores, Events(segments, labels=np.array([event[2] for event in events])), duration


def _noise(random: np.random.RandomState, sigma: float) -> Array:
    """(classes, steps), each step half like the one before."""
    noise = random.standard_normal((CLASSES, STEPS + 1)) * sigma
    return noise[:, 1:] + 0.5 * noise[:, :-1]


def _share(start: float, end: float) -> Array:
    """How much of each step lies between."""
    edges = np.arange(STEPS + 1) / STEPS
    return (np.minimum(edges[1:], end) - np.maximum(edges[:-1], start)).clip(0) * STEPS
