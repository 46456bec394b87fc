"""Training and evaluation of scanpath networks through the engine. Checked in: ``scanpaths/test_task.py``."""

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from attn_core.engine import Metric, TaskModel, build
from detection.scanpaths.metrics import (
    MULTIMATCH,
    behavior_delta,
    centers,
    mean_behavior,
    multimatch,
    sequence_score,
)
from detection.scanpaths.oat import OAT
from detection.scanpaths.searchers import BASELINES, PAD, Searcher, Seen, decode
from detection.scanpaths.shelves import next_object

IGNORED = -100


class ScanpathTask(TaskModel):
    """Teacher forcing: cross-entropy of each next object, of END behind the last; padding is not counted.

    Args:
        net: an `OAT`, or its recipe ``dict(type=..., ...)``.
        samples: paths that are drawn for each shelf in validation and test, beside the most likely one.
        max_length: of decoded paths.
        seed: of the draws, so that equal weights are measured equally.

    Raises: ValueError for fewer than one sample.
    """

    def __init__(
        self, net: nn.Module | dict[str, Any], *, samples: int = 10, max_length: int = 20, seed: int = 0
    ) -> None:
        super().__init__()
        if samples < 1:
            raise ValueError(f"ScanpathTask: samples must be at least 1, got samples={samples}")
        self.net: OAT = build(net)
        self.samples, self.max_length, self.seed = samples, max_length, seed

    def loss(
        self, crops: Float[Tensor, "B P 3 Y X"], target: Int[Tensor, " B"], path: Int[Tensor, "B T"], **_: Any
    ) -> dict[str, Tensor]:
        """``{"loss": cross-entropy}`` over the steps of all paths."""
        scores = self.net(crops, target, path)
        labels = next_labels(path, self.net.objects)
        return {"loss": F.cross_entropy(scores.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)}

    def predict(
        self,
        crops: Float[Tensor, "B P 3 Y X"],
        target: Int[Tensor, " B"],
        path: Int[Tensor, "B T"],
        likeness: Float[Tensor, "B P"] | None = None,
        **_: Any,
    ) -> list[dict[str, Any]]:
        """For each shelf ``truth``, ``target``, ``cells``, the ``likely`` path, ``drawn`` paths, and ``hits``.

        Hits are by searcher: for each step of the truth the chance to name it, with equal best scores sharing it; of
        the network (``oat``), the baselines, and with ``likeness`` of the program that searched (``possible``).
        """
        seen = self.net.encode(crops, target)
        labels = next_labels(path, self.net.objects)
        hits = {"oat": named(self.net.scores(seen, path), labels)}
        for name, baseline in BASELINES.items():
            hits[name] = named(baseline.scores(baseline.encode(crops, target, seen.cells), path), labels)
        likely = decode(self.net, seen, max_length=self.max_length)
        drawn = draw_paths(self.net, seen, self.samples, max_length=self.max_length, seed=self.seed)
        cells = seen.cells.cpu().numpy()
        found = []
        for row, truth in enumerate(_paths(path)):
            own = {name: each[row][: len(truth) + 1].tolist() for name, each in hits.items()}
            if likeness is not None:
                own["possible"] = _possible(likeness[row].double().cpu().numpy(), cells[row], int(target[row]), truth)
            found.append(
                {"truth": truth, "target": int(target[row]), "cells": cells[row], "likely": likely[row],
                 "drawn": drawn[row], "hits": own}
            )  # fmt: skip
        return found


def next_labels(path: Int[Tensor, "B T"], objects: int) -> Int[Tensor, "B T1"]:
    """What comes behind each prefix of a path: its next object, END (``objects``) behind the last, then −100."""
    labels = F.pad(path, (0, 1), value=PAD)
    lengths = (path != PAD).sum(1)
    places = torch.arange(labels.shape[1], device=path.device)
    labels = labels.masked_fill(places > lengths[:, None], IGNORED)
    return labels.masked_fill(places == lengths[:, None], objects)


def named(scores: Float[Tensor, "B T1 P2"], labels: Int[Tensor, "B T1"]) -> Float[Tensor, "B T1"]:
    """The chance that the best score, one of them at random, is the label's."""
    best = scores == scores.amax(2, keepdim=True)
    hit = best.gather(2, labels.clamp(min=0).unsqueeze(2)).squeeze(2)
    return (hit.float() / best.sum(2)).cpu()


def draw_paths(
    net: Searcher, seen: Seen, samples: int, *, max_length: int = 20, seed: int = 0
) -> list[list[list[int]]]:
    """Paths that are drawn at random from the scores, ``samples`` for each shelf."""
    generator = torch.Generator(seen.target.device).manual_seed(seed)
    paths = decode(net, seen.repeat(samples), sample=True, max_length=max_length, generator=generator)
    return [paths[start : start + samples] for start in range(0, len(paths), samples)]


def _paths(path: Int[Tensor, "B T"]) -> list[list[int]]:
    return [[place for place in row if place != PAD] for row in path.tolist()]


def _possible(likeness: Any, cells: Any, target: int, truth: Sequence[int]) -> list[float]:
    steps = [next_object(likeness, cells.astype(np.float64), target, truth[:k]) for k in range(len(truth) + 1)]
    labels = [*truth, len(cells)]
    return [float(chances.argmax() == label) for chances, label in zip(steps, labels, strict=True)]


class ScanpathScores(Metric):
    """Next-object accuracies, likeness of paths, and behavior beside the truth's.

    Names: ``next_accuracy`` and ``next_accuracy_<baseline>`` with the truth's past given, END counted;
    ``sequence_score`` and ``multimatch_<part>`` of the most likely path; ``sequence_score_drawn``; the five shares of
    the paths that were drawn, of the truth as ``truth_<share>``, and ``delta``, their mean relative difference.
    """

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:  # noqa: ARG002  mmengine's signature
        """Keep what `ScanpathTask.predict` gives."""
        self.results.extend(data_samples)

    def compute_metrics(self, results: list[dict[str, Any]]) -> dict[str, float]:
        """Means over all shelves of all processes."""
        found: dict[str, float] = {}
        for name in results[0]["hits"]:
            steps = [hit for one in results for hit in one["hits"].get(name, ())]
            found["next_accuracy" if name == "oat" else f"next_accuracy_{name}"] = fmean(steps)
        found["sequence_score"] = fmean(sequence_score(one["likely"], one["truth"]) for one in results)
        found["sequence_score_drawn"] = fmean(
            sequence_score(path, one["truth"]) for one in results for path in one["drawn"]
        )
        alike = np.array([_alike(one) for one in results])
        for part, name in enumerate(MULTIMATCH):
            kept = alike[:, part][np.isfinite(alike[:, part])]
            found[f"multimatch_{name}"] = float(kept.mean()) if len(kept) else 0.0
        own = mean_behavior([(path, one["target"]) for one in results for path in one["drawn"]])
        truth = mean_behavior([(one["truth"], one["target"]) for one in results])
        found |= own | {f"truth_{name}": value for name, value in truth.items()}
        found["delta"] = behavior_delta(own, truth)
        return found


def _alike(one: dict[str, Any]) -> tuple[float, ...]:
    rows, columns = one["cells"].max(0) + 1
    paths = (centers(path, one["cells"]) for path in (one["likely"], one["truth"]))
    return multimatch(*paths, size=(float(columns), float(rows)))
