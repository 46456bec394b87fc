"""From scores of cases to tables: means by class, and patients found or missed.

Means leave NaN out; means of distances also leave out infinity and say how many cases that were. macro: a number per
case, then their mean. micro: voxels counted over all cases, then one number.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from medical_seg.metrics.scores import DISTANCES

SMALL_ML = 3.0


def summarize(
    rows: Sequence[dict[str, Any]],
    patients: Sequence[dict[str, float]],
    *,
    by_volume: float = SMALL_ML,
    overlap: float = 0.0,
) -> dict[str, Any]:
    """What nnU-Net's summary.json holds, and the patients' table of the AGUNet paper.

    Args:
        rows: ``case``, ``label`` and what `compare` gives.
        patients: ``Dice``, ``ml_pred`` and ``ml_ref`` of each case, all foreground joined.
        by_volume: ml of truth that divide small from large.
        overlap: Dice above which a patient counts as found.

    Returns: ``metric_per_case``, ``mean`` by label, ``foreground_mean``, ``patients`` by group.
    """
    labels = list(dict.fromkeys(row["label"] for row in rows))
    mean = {str(label): _means([row for row in rows if row["label"] == label]) for label in labels}
    keys = [key for key in next(iter(mean.values())) if key not in ("n", "infinite_distances")]
    foreground = {key: _nanmean([table[key] for table in mean.values()]) for key in keys}
    small = [p for p in patients if 0 < p["ml_ref"] < by_volume]
    large = [p for p in patients if p["ml_ref"] >= by_volume]
    empty = [p for p in patients if p["ml_ref"] == 0]
    return {
        "metric_per_case": list(rows),
        "mean": mean,
        "foreground_mean": foreground,
        "patients": {
            "all": patient_table(patients, overlap),
            f"truth below {by_volume:g} ml": patient_table([*small, *empty], overlap),
            f"truth of {by_volume:g} ml or more": patient_table([*large, *empty], overlap),
        },
    }


def patient_table(patients: Sequence[dict[str, float]], overlap: float = 0.0) -> dict[str, float]:
    """Detection by patient: a lesion counts as found if the masks overlap by more than ``overlap`` (Dice).

    true positive: found; false negative: there is a lesion and it is not found; false positive: none is there and one
    is predicted; true negative: neither. Specificity is 1 without patients that have none.

    Args:
        patients: ``Dice``, ``ml_pred`` and ``ml_ref`` each.

    Source: dbouget/validation_metrics_computation, patient-wise metrics.
    """
    found = [p for p in patients if p["ml_ref"] > 0 and p["ml_pred"] > 0 and p["Dice"] > overlap]
    tp = len(found)
    fn = sum(p["ml_ref"] > 0 for p in patients) - tp
    fp = sum(p["ml_ref"] == 0 and p["ml_pred"] > 0 for p in patients)
    tn = sum(p["ml_ref"] == 0 and p["ml_pred"] == 0 for p in patients)
    recall = tp / (tp + fn) if tp + fn else float("nan")
    precision = tp / (tp + fp) if tp + fp else float("nan")
    return {
        "n": tp + fn,
        "TP": tp,
        "FP": fp,
        "FN": fn,
        "TN": tn,
        "recall": recall,
        "precision": precision,
        "F1": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else float("nan"),
        "specificity": tn / (tn + fp) if tn + fp else 1.0,
        "Dice_all": _nanmean([p["Dice"] for p in patients]),
        "Dice_found": _nanmean([p["Dice"] for p in found]),
    }


def patient(found: np.ndarray, true: np.ndarray, voxel_ml: float) -> dict[str, float]:
    """Dice (NaN where both masks are empty) and both volumes in ml, of two Boolean masks of one shape."""
    sizes = int(found.sum()), int(true.sum())
    dice = 2 * int((found & true).sum()) / sum(sizes) if sum(sizes) else float("nan")
    return {"Dice": dice, "ml_pred": sizes[0] * voxel_ml, "ml_ref": sizes[1] * voxel_ml}


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    keys = [key for key in rows[0] if key not in ("case", "label", *DISTANCES)]
    table: dict[str, Any] = {key: _nanmean([row[key] for row in rows]) for key in keys}
    for key in DISTANCES:
        table[key] = _nanmean([row[key] for row in rows if not np.isinf(row[key])])
    tp, fp, fn = (sum(row[key] for row in rows) for key in ("TP", "FP", "FN"))
    table["Dice_micro"] = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else float("nan")
    table["n"] = sum(not np.isnan(row["Dice"]) for row in rows)
    table["infinite_distances"] = sum(bool(np.isinf(row["HD95"])) for row in rows)
    return table


def _nanmean(values: Sequence[float]) -> float:
    kept = [value for value in values if not np.isnan(value)]
    return float(np.mean(kept)) if kept else float("nan")
