"""Scores of cases and tables of them."""

from typing import Any

import numpy as np
import pytest
import torch

from medical_seg.metrics.scores import compare
from medical_seg.metrics.summary import patient_table, summarize


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI calls itself with it
def test_scores_are_monai_s() -> None:
    from monai.metrics.hausdorff_distance import compute_hausdorff_distance
    from monai.metrics.meandice import compute_dice
    from monai.metrics.surface_dice import compute_surface_dice
    from monai.metrics.surface_distance import compute_average_surface_distance

    rng = np.random.default_rng(0)
    spacing = (2.0, 1.0, 0.5)
    truth = np.zeros((9, 12, 14), bool)
    truth[2:6, 3:9, 2:11] = True
    found = np.roll(truth, 1, 1) ^ (rng.random(truth.shape) < 0.02)
    ours = compare(found, truth, spacing, tolerance=1.0)
    a, b = (torch.from_numpy(x)[None, None] for x in (found, truth))
    assert ours["Dice"] == pytest.approx(float(compute_dice(a, b)))
    assert ours["HD95"] == pytest.approx(float(compute_hausdorff_distance(a, b, percentile=95, spacing=spacing)))
    asd = compute_average_surface_distance(a, b, symmetric=True, spacing=spacing)
    assert ours["ASSD"] == pytest.approx(float(asd), rel=1e-5)
    nsd = compute_surface_dice(a, b, [1.0], spacing=spacing)
    assert ours["NSD"] == pytest.approx(float(nsd), rel=1e-5)


def test_absent_classes_follow_one_rule() -> None:
    some, none = np.ones((2, 3, 3), bool), np.zeros((2, 3, 3), bool)
    both = compare(none, none, (1, 1, 1))
    assert all(np.isnan(both[key]) for key in ("Dice", "IoU", "HD95", "ASSD", "NSD"))
    one = compare(none, some, (1, 1, 1))
    assert (one["Dice"], one["IoU"], one["NSD"]) == (0, 0, 0)
    assert np.isinf([one["HD95"], one["ASSD"]]).all()
    with pytest.raises(ValueError, match=r"shapes \(2, 3, 3\) and \(1, 3, 3\) differ"):
        compare(some, some[:1], (1, 1, 1))


def test_macro_and_micro_and_the_patients_table_by_hand() -> None:
    def row(case: str, tp: int, fp: int, fn: int) -> dict[str, Any]:
        found, truth = np.zeros((1, 1, 100), bool), np.zeros((1, 1, 100), bool)
        truth[..., : tp + fn] = True
        found[..., fn : fn + tp + fp] = True
        return {"case": case, "label": 1, **compare(found, truth, (10, 10, 10))}

    rows = [
        row("a", 8, 0, 0),
        row("b", 1, 1, 1),
        row("c", 0, 0, 4),
        row("d", 0, 2, 0),
        row("e", 0, 0, 0),
        row("f", 4, 0, 4),
    ]
    patients = [{key: r[key] for key in ("Dice", "ml_pred", "ml_ref")} for r in rows]
    summary = summarize(rows, patients, by_volume=3.0)
    mean = summary["mean"]["1"]
    assert mean["Dice"] == pytest.approx(np.mean([1, 0.5, 0, 0, 2 / 3]))
    assert mean["Dice_micro"] == pytest.approx(26 / 38)
    assert (mean["n"], mean["infinite_distances"]) == (5, 2)
    whole = summary["patients"]["all"]
    assert [whole[k] for k in ("TP", "FN", "FP", "TN")] == [3, 1, 1, 1]
    assert (whole["recall"], whole["precision"], whole["F1"]) == (0.75, 0.75, 0.75)
    small = summary["patients"]["truth below 3 ml"]
    assert (small["n"], small["TP"]) == (1, 1)
    patients = [{"Dice": 0.5, "ml_pred": 1.0, "ml_ref": 1.0}]
    assert patient_table(patients, overlap=0.5)["recall"] == 0
    assert patient_table(patients)["specificity"] == 1
