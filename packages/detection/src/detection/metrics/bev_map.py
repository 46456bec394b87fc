"""The nuScenes detection metric: AP by distance of centers on the ground, and errors of the matched boxes.

Source: Caesar et al., nuScenes, CVPR 2020, arXiv 1903.11027, section 3.1; https://github.com/nutonomy/nuscenes-devkit,
``eval/detection/algo.py``. Same matching (best score first, nearest free object of the class), the same 101 points of
recall and floors of 0.1 for recall and precision. Left out: velocity and attribute errors, and NDS, which needs them.
Checked in: ``metrics/test_bev_map.py``.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_core.engine import Metric

Array = NDArray[np.float64]

DISTANCES = (0.5, 1.0, 2.0, 4.0)  # meters
ERROR_DISTANCE = 2.0  # of the matches whose errors count
FLOOR = 0.1
RECALLS = np.linspace(0, 1, 101)
FIRST = round(100 * FLOOR) + 1


class BEVAveragePrecision(Metric):
    """``mAP``, ``AP/<class>``, and mean ``ATE`` (m), ``ASE`` (1 − IoU), ``AOE`` (rad) over classes.

    Reads per sample ``boxes`` (n, ≥ 7: x, y, z, l, w, h, yaw), ``scores``, ``labels``, ``gt_boxes``, ``gt_labels``. A
    class without objects is left out of the means; errors of a class that is never found are 1.

    Args:
        classes: names; None numbers those that occur.
    """

    def __init__(self, classes: Sequence[str] | None = None) -> None:
        super().__init__()
        self.classes = classes

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:  # noqa: ARG002  mmengine's signature
        """Keep the boxes of each sample as arrays."""
        for sample in data_samples:
            names = ("boxes", "scores", "labels", "gt_boxes", "gt_labels")
            self.results.append({name: np.asarray(sample[name], dtype=np.float64) for name in names})

    def compute_metrics(self, results: list[dict[str, Array]]) -> dict[str, float]:
        """Metrics over all samples."""
        present = sorted({int(label) for sample in results for label in sample["gt_labels"]})
        metrics: dict[str, float] = {}
        precisions, errors = [], []
        for label in present:
            curves = [match(results, label, distance) for distance in DISTANCES]
            precision = float(np.mean([average_precision(curve) for curve in curves]))
            precisions.append(precision)
            errors.append(mean_errors(curves[DISTANCES.index(ERROR_DISTANCE)]))
            metrics[f"AP/{self.classes[label] if self.classes else label}"] = precision
        metrics["mAP"] = float(np.mean(precisions)) if precisions else 0.0
        for i, name in enumerate(("ATE", "ASE", "AOE")):
            metrics[name] = float(np.mean([error[i] for error in errors])) if errors else 1.0
        return metrics


def match(results: Sequence[dict[str, Array]], label: int, distance: float) -> dict[str, Array]:
    """Curves of one class over the score: recall and precision of every prediction, errors (n, 3) of the matches."""
    total = sum(int((sample["gt_labels"] == label).sum()) for sample in results)
    order = [
        (-float(sample["scores"][i]), number, i)
        for number, sample in enumerate(results)
        for i in np.flatnonzero(sample["labels"] == label)
    ]
    order.sort()
    free = [sample["gt_labels"] == label for sample in results]
    hits, errors, scores = [], [], []
    for negative_score, number, i in order:
        sample, box = results[number], results[number]["boxes"][i]
        apart = np.hypot(*(sample["gt_boxes"][:, :2] - box[:2]).T) if len(sample["gt_boxes"]) else np.zeros(0)
        apart = np.where(free[number], apart, np.inf)
        nearest = int(apart.argmin()) if len(apart) else -1
        hit = nearest >= 0 and apart[nearest] < distance
        hits.append(hit)
        if hit:
            free[number][nearest] = False
            truth = sample["gt_boxes"][nearest]
            turn = abs((box[6] - truth[6] + np.pi) % (2 * np.pi) - np.pi)
            errors.append((apart[nearest], 1 - aligned_iou(box[3:6], truth[3:6]), turn))
            scores.append(-negative_score)
    found = np.cumsum(hits) if hits else np.zeros(0)
    return {
        "recall": found / max(total, 1),
        "precision": found / np.arange(1, len(found) + 1),
        "score": np.array([-entry[0] for entry in order]),
        "errors": np.array(errors).reshape(-1, 3),
        "matched_score": np.array(scores),
    }


def aligned_iou(a: Array, b: Array) -> float:
    """IoU of two boxes of sizes (3,) with the same center and heading."""
    shared = np.minimum(a, b).prod()
    return float(shared / (a.prod() + b.prod() - shared))


def average_precision(curve: dict[str, Array]) -> float:
    """Mean of the precision above both floors, scaled to [0, 1]."""
    if not len(curve["errors"]):
        return 0.0
    precision = np.interp(RECALLS, curve["recall"], curve["precision"], right=0)
    return float(np.maximum(precision[FIRST:] - FLOOR, 0).mean() / (1 - FLOOR))


def mean_errors(curve: dict[str, Array]) -> Array:
    """Translation, scale and orientation error, each averaged over recalls from the floor to the highest reached."""
    if not len(curve["errors"]):
        return np.ones(3)
    confidence = np.interp(RECALLS, curve["recall"], curve["score"], right=0)
    last = int(np.flatnonzero(confidence)[-1]) if confidence.any() else 0
    if last < FIRST:
        return np.ones(3)
    running = np.cumsum(curve["errors"], 0) / np.arange(1, len(curve["errors"]) + 1)[:, None]
    at_recall = [np.interp(confidence[::-1], curve["matched_score"][::-1], column[::-1])[::-1] for column in running.T]
    return np.array([column[FIRST : last + 1].mean() for column in at_recall])
