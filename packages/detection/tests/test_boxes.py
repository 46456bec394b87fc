"""Boxes, overlaps, deltas and post-processing against formulas written out, and torchvision."""

import math

import pytest
import torch
from torchvision.ops import generalized_box_iou

from detection.boxes import apply_deltas, cxcywh_to_xyxy, deltas_of, inverse_sigmoid, pairwise_giou, xyxy_to_cxcywh
from detection.post_process import post_process_object_detection, suppress, top_scores
from detection.tasks.detection import to_original


def some_boxes(count: int) -> torch.Tensor:
    low = torch.rand(count, 2, dtype=torch.float64)
    return torch.cat([low, low + 0.1 + torch.rand(count, 2, dtype=torch.float64)], 1)


def test_formats_are_inverse_and_giou_is_torchvisions() -> None:
    a, b = some_boxes(5), some_boxes(7)
    torch.testing.assert_close(cxcywh_to_xyxy(xyxy_to_cxcywh(a)), a)
    torch.testing.assert_close(pairwise_giou(a, b), generalized_box_iou(a, b))


def test_deltas_move_scale_and_are_cut_off() -> None:
    reference = torch.tensor([[50.0, 40.0, 20.0, 10.0]])
    limit = torch.tensor([[64.0, 48.0, 64.0, 48.0]])
    moved = apply_deltas(reference, torch.tensor([[0.1, -0.2, math.log(2), 0.0]]), limit)
    # center 52, 38; size 40×10 → 32…72 cut at 64
    torch.testing.assert_close(moved, xyxy_to_cxcywh(torch.tensor([[32.0, 33.0, 64.0, 43.0]])))
    far = torch.tensor([[5000.0, 5000.0, 20.0, 10.0]])
    huge = apply_deltas(far, torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.full((1, 4), 1e9))
    torch.testing.assert_close(huge[0, 2], torch.tensor(20.0 * 1000 / 16))


def test_wanted_deltas_enlarge_the_reference_by_a_tenth_of_a_pixel() -> None:
    reference, target = torch.tensor([[50.0, 40.0, 19.9, 9.9]]), torch.tensor([[60.0, 45.0, 40.0, 10.0]])
    torch.testing.assert_close(deltas_of(reference, target), torch.tensor([[0.5, 0.5, math.log(2), 0.0]]))


def test_inverse_sigmoid_stays_finite_at_the_ends() -> None:
    x = torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    torch.testing.assert_close(inverse_sigmoid(x), torch.logit(x, eps=1e-5), atol=2e-5, rtol=0)


def test_boxes_of_a_resized_picture_return_within_a_thousandth_of_a_pixel() -> None:
    boxes = torch.tensor([[3.0, 5.0, 630.0, 400.0]])
    scaled = boxes * torch.tensor([1203 / 640, 800 / 427]).repeat(2)
    torch.testing.assert_close(to_original(scaled, (800, 1203), (427, 640)), boxes, atol=1e-3, rtol=0)


def test_post_processing_keeps_the_best_scores_of_all_classes() -> None:
    logits = torch.tensor([[[3.0, -9.0], [2.0, 1.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 1.0], [0.25, 0.5, 0.5, 0.2]]])
    found = post_process_object_detection({"pred_logits": logits, "pred_boxes": boxes}, 0.5, [(10, 20)])[0]
    assert found["labels"].tolist() == [0, 0, 1]
    torch.testing.assert_close(found["boxes"][1], torch.tensor([0.0, 4.0, 10.0, 6.0]))
    assert (
        len(post_process_object_detection({"pred_logits": logits, "pred_boxes": boxes}, 0.5, None, 1)[0]["scores"]) == 1
    )
    assert top_scores(logits, 99)[0].shape == (1, 4)
    with pytest.raises(ValueError, match="target_sizes has 2 entries for 1 pictures"):
        post_process_object_detection({"pred_logits": logits, "pred_boxes": boxes}, 0.5, [(1, 1), (2, 2)])


def test_suppression_keeps_the_best_of_each_class() -> None:
    found = {
        "boxes": torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 9], [0.0, 0, 10, 9]]),
        "scores": torch.tensor([0.5, 0.9, 0.4]),
        "labels": torch.tensor([1, 1, 2]),
    }
    assert suppress(found, 0.5)["scores"].tolist() == pytest.approx([0.9, 0.4])
    with pytest.raises(ValueError, match="iou must be in"):
        suppress(found, 1.5)
