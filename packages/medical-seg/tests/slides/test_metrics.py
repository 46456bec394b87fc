"""Figures of slides against scikit-learn's."""

import math

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score

from medical_seg.slides.metrics import SlideFigures, area_under_roc, figures


def test_figures_equal_scikit_learn_s_macro_averages() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([0] * 30 + [1] * 8 + [2] * 5)
    scores = np.round(rng.dirichlet([1, 1, 1], 43) + 0.5 * np.eye(3)[labels], 1)  # with many ties
    scores /= scores.sum(1, keepdims=True)
    found = figures(scores, labels, "abc")
    assert found["auc_macro"] == pytest.approx(roc_auc_score(labels, scores, multi_class="ovr", average="macro"))
    assert found["f1_macro"] == pytest.approx(f1_score(labels, scores.argmax(1), average="macro"))
    assert found["accuracy"] == pytest.approx(f1_score(labels, scores.argmax(1), average="micro"))
    assert found["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(labels, scores.argmax(1)))
    assert found["f1_macro"] < found["accuracy"] - 0.02  # or the test could not tell one from the other
    assert found["f1_macro_and_auc"] == found["f1_macro"] + found["auc_macro"]
    metric = SlideFigures(["a", "b", "c"])
    metric.process(None, [{"scores": s, "label": t} for s, t in zip(scores, labels, strict=True)])
    assert metric.compute_metrics(metric.results) == pytest.approx(found)


def test_what_a_split_cannot_say_is_left_out_and_selects_nothing_wrong() -> None:
    scores, labels = np.array([[0.9, 0.1, 0.0], [0.2, 0.8, 0.0], [0.3, 0.6, 0.1]]), np.array([0, 1, 0])
    found = figures(scores, labels, "abc")
    assert math.isnan(found["auc_c"])
    assert found["auc_macro"] == 1.0
    assert found["f1_macro"] == pytest.approx((2 / 3 + 2 / 3) / 2)
    one = figures(scores, np.zeros(3, int), "abc")
    assert math.isnan(one["auc_macro"])
    assert one["f1_macro_and_auc"] == one["f1_macro"]
    assert area_under_roc(np.array([0.1, 0.1]), np.array([True, False])) == 0.5
