"""Set losses and matching against a formulation in loops."""

import math
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import generalized_box_iou, sigmoid_focal_loss

from detection.boxes import cxcywh_to_xyxy
from detection.losses import HybridCriterion
from detection.matchers import hungarian_match
from detection.models import create_model
from detection.tasks.detection import DetectionTask


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def layer(queries: int = 6, *, deltas: bool = False) -> dict[str, Tensor]:
    boxes = torch.rand(2, queries, 4).double() * 0.5 + 0.2
    made = {"pred_logits": torch.randn(2, queries, 3).double(), "pred_boxes": boxes}
    if deltas:
        made |= {"pred_deltas": torch.randn_like(boxes), "pred_boxes_old": torch.rand_like(boxes) + 0.1}
    return made


def targets() -> list[dict[str, Tensor]]:
    return [
        {"labels": torch.tensor([0, 2]), "boxes": torch.rand(2, 4).double() * 0.5 + 0.2},
        {"labels": torch.empty(0, dtype=torch.int64), "boxes": torch.empty(0, 4).double()},
    ]


def box_error(outputs: dict[str, Tensor], query: int, box: Tensor) -> Tensor:
    if "pred_deltas" not in outputs:
        return (outputs["pred_boxes"][0, query] - box).abs().sum()
    old = outputs["pred_boxes_old"][0, query]
    wanted = [(box[i] - old[i]) / (old[i + 2] + 0.1) for i in (0, 1)] + [
        torch.log(box[i] / (old[i] + 0.1)) for i in (2, 3)
    ]
    return (outputs["pred_deltas"][0, query] - torch.stack(wanted)).abs().sum()


def overlap(a: Tensor, b: Tensor) -> Tensor:
    return generalized_box_iou(cxcywh_to_xyxy(a)[None], cxcywh_to_xyxy(b)[None])[0, 0]


@pytest.mark.parametrize("deltas", [False, True])
def test_losses_equal_the_best_of_all_assignments(deltas: bool) -> None:
    outputs, wanted = layer(deltas=deltas), targets()
    weight = 1.0 if deltas else 5.0

    def cost(query: int, label: int, box: Tensor) -> float:
        p = outputs["pred_logits"][0, query, label].sigmoid()
        focal = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
        total = 2 * focal + weight * box_error(outputs, query, box) - 2 * overlap(outputs["pred_boxes"][0, query], box)
        return float(total)

    labels, boxes = wanted[0]["labels"].tolist(), wanted[0]["boxes"]
    best = min(permutations(range(6), 2), key=lambda q: sum(cost(q[i], labels[i], boxes[i]) for i in range(2)))
    query, own = hungarian_match(outputs, wanted, box_cost=weight)[0]
    assert dict(zip(own.tolist(), query.tolist(), strict=True)) == dict(enumerate(best))

    onehot = torch.zeros_like(outputs["pred_logits"])
    for i in range(2):
        onehot[0, best[i], labels[i]] = 1
    found = HybridCriterion(box_weight=weight)({"layers": [outputs], "layers_many": [], "proposals": outputs}, wanted)
    focal = sigmoid_focal_loss(outputs["pred_logits"], onehot, 0.25, 2, reduction="sum")
    torch.testing.assert_close(found["loss_class_0"], 2 * focal / 2)
    errors = sum(box_error(outputs, best[i], boxes[i]) for i in range(2))
    torch.testing.assert_close(found["loss_box_0"], weight * errors / 2)
    loss = sum(1 - overlap(outputs["pred_boxes"][0, best[i]], boxes[i]) for i in range(2))
    torch.testing.assert_close(found["loss_giou_0"], torch.as_tensor(2 * loss / 2))


def test_the_second_group_finds_every_object_repeatedly_and_proposals_know_no_classes() -> None:
    outputs: dict[str, Any] = {"layers": [layer()], "layers_many": [layer(8)], "proposals": layer(9)}
    wanted = targets()
    found = HybridCriterion(repeats=3, many_weight=0.5)(outputs, wanted)
    many = [{key: value.repeat(*(3,) + (1,) * (value.dim() - 1)) for key, value in t.items()} for t in wanted]
    again = HybridCriterion()({**outputs, "layers": outputs["layers_many"], "layers_many": []}, many)
    torch.testing.assert_close(found["loss_box_0_many"], 0.5 * again["loss_box_0"])
    zeroed = [{**t, "labels": torch.zeros_like(t["labels"])} for t in wanted]
    agnostic = HybridCriterion()({"layers": [outputs["proposals"]], "layers_many": [], "proposals": layer()}, zeroed)
    torch.testing.assert_close(found["loss_class_proposals"], agnostic["loss_class_0"])
    assert set(found) == {f"loss_{k}_{e}" for k in ("class", "box", "giou") for e in ("0", "0_many", "proposals")}


def test_heavier_class_losses_leave_boxes_and_their_matching_alone() -> None:
    outputs: dict[str, Any] = {"layers": [layer()], "layers_many": [], "proposals": layer()}
    wanted = targets()
    heavy, default = HybridCriterion(class_weight=20.0)(outputs, wanted), HybridCriterion()(outputs, wanted)
    for name, value in default.items():
        torch.testing.assert_close(heavy[name], value * (10 if "class" in name else 1))
    model: Any = create_model("test_plain_detr", class_weight=20.0)
    assert model.criterion.class_weight == 20.0


def test_proposals_matched_by_anchors_learn_at_the_nearest_cell() -> None:
    anchors = torch.tensor([[[10.0, 10, 8, 8], [50.0, 50, 8, 8]]])
    target = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[11.0, 10, 8, 8]])}]
    # The far anchor predicts the object, the near one predicts something else.
    moved = torch.tensor([[[5.0, 0, 0, 0], [-4.875, -5, 0, 0]]])
    proposals = {"pred_logits": torch.zeros(1, 2, 3), "pred_boxes": anchors + moved * 8, "pred_deltas": moved,
                 "pred_boxes_old": anchors}  # fmt: skip
    outputs: dict[str, Any] = {"layers": [proposals], "layers_many": [], "proposals": proposals}
    free = HybridCriterion(box_weight=1.0)(outputs, target)
    fixed = HybridCriterion(box_weight=1.0, match_anchors=True)(outputs, target)
    assert free["loss_giou_proposals"] < 1e-6 < 1 < fixed["loss_giou_proposals"]
    assert fixed["loss_giou_0"] < 1e-6  # decoder layers are matched as before
    model: Any = create_model("test_plain_detr", reparam=True, match_anchors=True)
    assert model.criterion.match_anchors


def test_pictures_without_objects_train_towards_nothing() -> None:
    empty = [targets()[1]] * 2
    found = HybridCriterion()({"layers": [layer()], "layers_many": [], "proposals": layer()}, empty)
    assert found["loss_box_0"] == found["loss_giou_0"] == 0 < found["loss_class_0"]


def test_divergence_and_wrong_repeats_are_named() -> None:
    outputs = layer()
    outputs["pred_boxes"] = outputs["pred_boxes"] * math.nan
    with pytest.raises(ValueError, match="12 costs of picture 0 are not finite"):
        hungarian_match(outputs, targets())
    with pytest.raises(ValueError, match="repeats=0"):
        HybridCriterion(repeats=0)


def test_a_detector_learns_one_picture_by_heart() -> None:
    task = DetectionTask(create_model("test_plain_detr", reparam=True, queries_many=0))
    image, boxes = torch.rand(3, 64, 64), torch.tensor([[8.0, 8, 40, 40]])
    image[:, 8:40, 8:40] = 1
    batch: dict[str, Any] = {"image": [image], "boxes": [boxes], "labels": [torch.tensor([3])]}
    optimizer = torch.optim.Adam(task.parameters(), lr=3e-3)
    losses = {}
    for _ in range(60):
        losses = task(mode="loss", **batch)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    assert all(name.startswith("loss_") for name in losses)
    task.eval()
    found = task(mode="predict", **batch, image_id=[5], original_size=[(128, 64)], annotations=[[]])[0]
    assert found["image_id"] == 5
    assert found["labels"][0] == 3
    assert (found["boxes"][0] - torch.tensor([8.0, 16, 40, 80])).abs().max() < 8
