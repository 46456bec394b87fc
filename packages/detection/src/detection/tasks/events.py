"""Training of BMN and what it finds. Checked in: ``tasks/test_events.py``."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from attn_core.engine import TaskModel, build
from detection.losses.boundary_matching import bmn_loss
from detection.metrics.events import Events
from detection.models.bmn.network import BMN, Boundaries


class EventTask(TaskModel):
    """The losses of BMN; predictions are all proposals of a window, scored and named.

    Args:
        net: a `BMN`, or its recipe ``dict(type=..., ...)``.
        classes: the first F // classes · classes channels of the features are scores of the classes, one stream behind
            the other; a proposal has the class whose scores are highest in it, and its score times that mean. 0: all
            proposals have class 0.

    Raises: ValueError for more classes than features.
    """

    def __init__(self, net: nn.Module | dict[str, Any], *, classes: int = 0) -> None:
        super().__init__()
        self.net: BMN = build(net)
        if not 0 <= classes <= self.net.features:
            raise ValueError(f"EventTask: classes must be 0…{self.net.features}, the features, got classes={classes}")
        self.classes = classes

    def loss(
        self,
        features: Float[Tensor, "B F T"],
        overlaps: Float[Tensor, "B T T"],
        starts: Float[Tensor, "B T"],
        ends: Float[Tensor, "B T"],
        semantics: Float[Tensor, "B R T"] | None = None,
        **_: Any,
    ) -> dict[str, Tensor]:
        """The three parts of `bmn_loss`."""
        found: Boundaries = self.net(features, semantics)
        return bmn_loss(found.pairs, found.start, found.end, overlaps, starts, ends, self.net.valid(features.device))

    def predict(
        self,
        features: Float[Tensor, "B F T"],
        truth: Sequence[Events],
        video: Sequence[str],
        window: Sequence[tuple[float, float]],
        duration: Sequence[float],
        semantics: Float[Tensor, "B R T"] | None = None,
        **_: Any,
    ) -> list[dict[str, Any]]:
        """For each window ``found``, ``truth``, ``video`` and ``duration``; times in seconds of the video."""
        maps = self.net(features, semantics)
        proposals = propose(maps, self.net.valid(features.device))
        rows = []
        for row, own in enumerate(proposals):
            named = name_proposals(own, features[row], self.classes)
            start, end = window[row]
            segments = start + named.segments * (end - start)
            rows.append({"found": Events(segments, named.scores, named.labels), "truth": truth[row],
                         "video": video[row], "duration": duration[row]})  # fmt: skip
        return rows


def propose(found: Boundaries, valid: Float[Tensor, "T T"]) -> list[Events]:
    """All pairs of each window in shares of it, scored by start × end × regression × classification.

    As published, pair [i, j] goes from step i to step j + 1, whose score as an end it takes: none ends with the window.
    """
    steps = valid.shape[0]
    start, last = valid.cpu().nonzero(as_tuple=True)
    kept = last + 1 < steps
    start, last = start[kept], last[kept]
    segments = torch.stack([start, last + 1], 1).double().numpy() / steps
    pairs, starts, ends = (each.detach().float().cpu() for each in found)
    scores = pairs[:, 0, start, last] * pairs[:, 1, start, last] * starts[:, start] * ends[:, last + 1]
    return [Events(segments, own.double().numpy(), np.zeros(len(segments), np.int64)) for own in scores]


def name_proposals(found: Events, features: Float[Tensor, "F T"], classes: int) -> Events:
    """Each proposal with the class whose scores have the highest mean in it, and its score times that mean."""
    if not classes:
        return found
    steps = features.shape[1]
    streams = features[: len(features) // classes * classes].detach().double().cpu().numpy()
    scores = streams.reshape(-1, classes, steps).mean(0)
    sums = np.concatenate([np.zeros((classes, 1)), scores.cumsum(1)], 1)
    first, last = (found.segments * steps).round().astype(int).T
    means = (sums[:, last] - sums[:, first]) / np.maximum(last - first, 1)
    return Events(found.segments, found.scores * means.max(0), means.argmax(0))
