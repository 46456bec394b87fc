"""ATSS: assignment against the loop of the paper, losses, and the coder that FCOS's post-processing calls."""

import torch
from torchvision.ops import box_iou, generalized_box_iou_loss

from detection.models.bvr.atss import ATSSHead, DeltaCoder, assign


def grid(stride: int, side: int) -> torch.Tensor:
    """Square anchors of 8 strides around the cells of a grid."""
    center = torch.arange(side) * float(stride)
    y, x = torch.meshgrid(center, center, indexing="ij")
    half = 4.0 * stride
    return torch.stack([x - half, y - half, x + half, y + half], -1).flatten(0, 1)


def test_assignment_equals_the_papers_algorithm() -> None:
    """Objects of all shapes at places where no two distances are equal; narrow ones have centers of anchors outside."""
    levels = [grid(4, 16).double(), grid(8, 8).double(), grid(16, 4).double()]
    anchors, sizes = torch.cat(levels), [len(level) for level in levels]
    corner = torch.rand(24, 2).double() * 50 - 5
    boxes = torch.cat([corner, corner + 2 + torch.rand(24, 2).double() * 40], 1)
    expected = [-1] * len(anchors)
    best = [-1.0] * len(anchors)
    for g, box in enumerate(boxes):
        goal = (box[:2] + box[2:]) / 2
        candidates, start = [], 0
        for level in levels:
            centers = (level[:, :2] + level[:, 2:]) / 2
            candidates += (start + (centers - goal).norm(dim=1).argsort()[:9]).tolist()
            start += len(level)
        overlaps = box_iou(anchors[candidates], box[None])[:, 0]
        threshold = overlaps.mean() + overlaps.std()
        for i, overlap in zip(candidates, overlaps.tolist(), strict=True):
            x, y = ((anchors[i, :2] + anchors[i, 2:]) / 2).tolist()
            inside = min(x - box[0], y - box[1], box[2] - x, box[3] - y) > 0.01
            if overlap >= threshold and inside and overlap > best[i]:
                best[i], expected[i] = overlap, g
    found = assign(anchors, sizes, boxes)
    assert found.tolist() == expected
    assert len(found[found >= 0].unique()) >= 12
    assert (assign(anchors, sizes, torch.zeros(0, 4)) == -1).all()


def test_losses_weigh_boxes_by_centerness() -> None:
    head = ATSSHead(32, 3)
    anchors = torch.tensor([[0.0, 0, 32, 32], [8, 8, 40, 40], [64, 64, 96, 96]])
    target = {"boxes": torch.tensor([[4.0, 2, 30, 36]]), "labels": torch.tensor([2])}
    outputs = {
        "cls_logits": torch.zeros(1, 3, 3),
        "bbox_regression": torch.randn(1, 3, 4) * 0.1,
        "bbox_ctrness": torch.zeros(1, 3, 1),
    }
    losses = head.compute_loss([target], outputs, [anchors], [torch.tensor([0, 0, -1])])
    centers = (anchors[:2, :2] + anchors[:2, 2:]) / 2
    left, right = centers - target["boxes"][0, :2], target["boxes"][0, 2:] - centers
    weight = (torch.minimum(left, right) / torch.maximum(left, right)).prod(1).sqrt()
    found = DeltaCoder().decode(outputs["bbox_regression"][0, :2], anchors[:2])
    overlap = generalized_box_iou_loss(found, target["boxes"].expand(2, -1))
    torch.testing.assert_close(losses["bbox_regression"], 2 * (overlap * weight).sum() / weight.sum())
    torch.testing.assert_close(losses["bbox_ctrness"], torch.tensor(2.0).log())  # at logit 0, whatever the target
    empty = head.compute_loss([target], outputs, [anchors], [torch.full((3,), -1)])
    assert all(value.isfinite() for value in empty.values())


def test_zero_deltas_decode_to_the_anchor() -> None:
    anchors = torch.tensor([[0.0, 0, 32, 32], [8, 8, 40, 56]])
    torch.testing.assert_close(DeltaCoder().decode(torch.zeros(2, 4), anchors), anchors)
    moved = DeltaCoder().decode(torch.tensor([[1.0, 0, 0, 0]]), anchors[:1])
    torch.testing.assert_close(moved, anchors[:1] + torch.tensor([3.2, 0, 3.2, 0]))
