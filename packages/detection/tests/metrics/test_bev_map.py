"""The nuScenes metric on cases that can be computed by hand."""

import math

import numpy as np
import pytest

from detection.metrics.bev_map import BEVAveragePrecision, aligned_iou


def sample(
    boxes: list[list[float]], scores: list[float], labels: list[int], truth: list[list[float]], kinds: list[int]
) -> dict[str, np.ndarray]:
    return {
        "boxes": np.array(boxes, dtype=float).reshape(-1, 7),
        "scores": np.array(scores),
        "labels": np.array(labels),
        "gt_boxes": np.array(truth, dtype=float).reshape(-1, 7),
        "gt_labels": np.array(kinds),
    }


def score(*samples: dict) -> dict[str, float]:
    metric = BEVAveragePrecision(["car", "truck"])
    metric.process(None, list(samples))
    return metric.compute_metrics(metric.results)


BOX = [1.0, 2.0, 0.0, 4.0, 2.0, 1.5, 0.3]


def moved(dx: float, turn: float = 0.0) -> list[float]:
    return [BOX[0] + dx, *BOX[1:6], BOX[6] + turn]


def test_perfect_predictions_score_one_and_err_nowhere() -> None:
    metrics = score(sample([BOX], [0.9], [0], [BOX], [0]), sample([BOX], [0.8], [0], [BOX], [0]))
    assert metrics["mAP"] == pytest.approx(1)
    assert (metrics["ATE"], metrics["ASE"], metrics["AOE"]) == pytest.approx((0, 0, 0))


def test_distance_decides_which_thresholds_match() -> None:
    # 1.5 m off: found at 2 and 4 m only
    metrics = score(sample([moved(1.5, 0.2)], [0.9], [0], [BOX], [0]))
    assert metrics["AP/car"] == pytest.approx(0.5)
    assert metrics["ATE"] == pytest.approx(1.5)
    assert metrics["AOE"] == pytest.approx(0.2)


def test_a_second_prediction_of_one_object_is_false() -> None:
    single = score(sample([BOX], [0.9], [0], [BOX, moved(20)], [0, 0]))["mAP"]
    doubled = score(sample([BOX, moved(0.1), moved(20)], [0.9, 0.8, 0.7], [0, 0, 0], [BOX, moved(20)], [0, 0]))["mAP"]
    assert 0.4 < single < 0.5  # recall stops at one half; the floor of 0.1 is cut off
    assert single < doubled < 1


def test_classes_without_objects_are_left_out_and_missed_ones_count_zero() -> None:
    metrics = score(sample([BOX], [0.9], [0], [BOX, moved(10)], [0, 1]))
    assert metrics["AP/truck"] == 0
    assert metrics["mAP"] == pytest.approx(0.5)
    assert metrics["ATE"] == pytest.approx(0.5)  # 0 for cars, 1 for trucks
    assert "AP/truck" not in score(sample([BOX], [0.9], [0], [BOX], [0]))


def test_no_predictions_and_no_objects_are_legal() -> None:
    assert score(sample([], [], [], [BOX], [0]))["mAP"] == 0
    assert score(sample([], [], [], [], []))["mAP"] == 0


def test_low_recall_gives_error_one() -> None:
    # one of twenty found: recall 0.05 stays below the floor
    truth = [moved(20 * i) for i in range(20)]
    metrics = score(sample([truth[0]], [0.9], [0], truth, [0] * 20))
    assert metrics["mAP"] == 0
    assert metrics["ATE"] == 1


def test_orientation_wraps_and_size_is_compared_at_one_center() -> None:
    half = score(sample([[*BOX[:6], math.pi - 0.1]], [0.9], [0], [[*BOX[:6], -math.pi + 0.1]], [0]))
    assert half["AOE"] == pytest.approx(0.2)
    assert aligned_iou(np.array([2.0, 1, 1]), np.array([1.0, 1, 1])) == pytest.approx(0.5)
