"""Figures of slide classification, each with its way of averaging in its name."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from attn_core.engine import Metric


class SlideFigures(Metric):
    """What a set of slides says about a network.

    Names: ``auc_macro``, the mean over classes of the area under the ROC curve of one class against the rest (with two
    classes both are the same); ``f1_macro``, the mean over classes; ``accuracy``, which is the micro-averaged F1;
    ``balanced_accuracy``, the mean recall; ``auc_<class>``; ``f1_macro_and_auc``, the sum that selects weights. Classes
    without a slide, or with nothing but slides, have no AUC, those without a slide no recall; what is missing is left
    out of means, and an AUC that no class has is NaN.

    Reads ``{"scores": (K,) probabilities, "label": int}`` per slide.

    Args:
        classes: names.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        super().__init__()
        self.classes = list(classes)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:  # noqa: ARG002  mmengine's signature
        """Keep scores and labels."""
        self.results += [([float(s) for s in sample["scores"]], int(sample["label"])) for sample in data_samples]

    def compute_metrics(self, results: list[tuple[list[float], int]]) -> dict[str, float]:
        """Figures over all slides of all processes."""
        scores = np.array([row[0] for row in results])
        labels = np.array([row[1] for row in results])
        return figures(scores, labels, self.classes)


def figures(scores: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """The figures of `SlideFigures`.

    Shapes: scores (slides, K), labels (slides,).
    """
    found = scores.argmax(1)
    areas = {name: area_under_roc(scores[:, k], labels == k) for k, name in enumerate(classes)}
    hits, predicted, true = (
        np.array([count(k) for k in range(len(classes))], dtype=float)
        for count in (
            lambda k: ((found == k) & (labels == k)).sum(),
            lambda k: (found == k).sum(),
            lambda k: (labels == k).sum(),
        )
    )
    f1 = np.divide(2 * hits, predicted + true, out=np.full_like(hits, np.nan), where=predicted + true > 0)
    recall = np.divide(hits, true, out=np.full_like(hits, np.nan), where=true > 0)
    auc = _mean(np.array(list(areas.values())))
    return {
        "auc_macro": auc,
        "f1_macro": _mean(f1),
        "accuracy": float((found == labels).mean()),
        "balanced_accuracy": _mean(recall),
        **{f"auc_{name}": area for name, area in areas.items()},
        "f1_macro_and_auc": _mean(f1) + (0.0 if np.isnan(auc) else auc),
    }


def area_under_roc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive has a higher score than a negative; ties count half. NaN if either is missing."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    below = np.cumsum(counts) - counts
    ranks = (below + (counts + 1) / 2)[inverse]  # the mean rank of those that share a score
    n = int(positive.sum())
    if not n or n == len(positive):
        return float("nan")
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))


def _mean(values: np.ndarray) -> float:
    return float(np.nanmean(values)) if not np.isnan(values).all() else float("nan")
