"""The metric of training: Dice by class."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from attn_core.engine import Metric


class Dice(Metric):
    """Overlap of prediction and truth, in [0, 1].

    Names: ``dice`` is the mean over cases and foreground classes, classes that are absent from both left out;
    ``dice_<class>`` the mean over cases; ``dice_pooled`` comes from voxels counted over all cases. Where cases have
    no foreground at all, ``empty_cases`` is their number and ``empty_left_empty`` the share that stayed so.

    Args:
        classes: names of the foreground's classes or regions.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__()
        self.classes = list(classes)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:  # noqa: ARG002  mmengine's signature
        """Keep the counts."""
        self.results += [{key: sample[key] for key in ("hits", "predicted", "true")} for sample in data_samples]

    def compute_metrics(self, results: list[dict[str, list[int]]]) -> dict[str, float]:
        """Means over all cases of all processes."""
        counts = np.array([[row["hits"], row["predicted"], row["true"]] for row in results], dtype=float)
        size = counts[:, 1] + counts[:, 2]
        dice = np.divide(2 * counts[:, 0], size, out=np.full_like(size, np.nan), where=size > 0)
        pooled = counts.sum(0)
        total = (pooled[1] + pooled[2]).sum()
        metrics = {"dice": float(np.nanmean(dice)) if not np.isnan(dice).all() else float("nan")}
        for name, column in zip(self.classes, dice.T, strict=True):
            metrics[f"dice_{name}"] = float(np.nanmean(column)) if not np.isnan(column).all() else float("nan")
        metrics["dice_pooled"] = float(2 * pooled[0].sum() / total) if total else float("nan")
        if (empty := counts[:, 2].sum(1) == 0).any():
            metrics["empty_cases"] = float(empty.sum())
            metrics["empty_left_empty"] = float((counts[empty, 1].sum(1) == 0).mean())
        return metrics
