"""ATSS: one anchor per cell, positives chosen per object from the IoUs of its nearest anchors.

Paper: Zhang et al., Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample
Selection, CVPR 2020, arXiv 1912.02424. Official code: https://github.com/sfzhang15/ATSS; the form that RelationNet++
extends is mmdet's ``ATSSHead``, which this follows: towers with group norm, box deltas with standard deviations
0.1, 0.1, 0.2, 0.2, GIoU loss of weight 2 weighted by the centerness of the target.

Built on torchvision's FCOS (towers, transform, post-processing with √(class · centerness)); assignment and losses are
ours. Difference: mmdet scores class · centerness without the root, which orders boxes the same; ``score_thresh`` is
compared with the square root here. Checked in: ``models/bvr/test_atss.py``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torchvision.models.detection import FCOS
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.fcos import FCOSHead
from torchvision.ops import box_iou, generalized_box_iou_loss, sigmoid_focal_loss

Maps = list[Tensor]


class DeltaCoder:
    """Box deltas with standard deviations (0.1, 0.1, 0.2, 0.2), under the method name that FCOS calls."""

    def __init__(self) -> None:
        self.coder = BoxCoder((10.0, 10.0, 5.0, 5.0))

    def decode(self, deltas: Float[Tensor, "*n 4"], anchors: Float[Tensor, "*n 4"]) -> Float[Tensor, "*n 4"]:
        """Boxes of deltas relative to anchors."""
        return self.coder.decode_single(deltas.flatten(0, -2), anchors.flatten(0, -2)).view_as(anchors)


def assign(
    anchors: Float[Tensor, "N 4"], per_level: list[int], boxes: Float[Tensor, "n 4"], *, top_k: int = 9
) -> Int[Tensor, " N"]:
    """Index of the box that each anchor is to find, −1 for none.

    Candidates of a box are the ``top_k`` anchors of each level whose centers are nearest to its own. Positive are those
    with an IoU of at least mean + standard deviation of the candidates' IoUs and a center inside the box; an anchor
    that several boxes want goes to the one with the highest IoU.
    """
    chosen = torch.full((len(anchors),), -1, dtype=torch.long, device=anchors.device)
    if not len(boxes):
        return chosen
    overlap = box_iou(anchors, boxes)
    centers, goals = (anchors[:, :2] + anchors[:, 2:]) / 2, (boxes[:, :2] + boxes[:, 2:]) / 2
    apart = torch.cdist(centers, goals)
    candidates, start = [], 0
    for count in per_level:
        nearest = apart[start : start + count].topk(min(top_k, count), 0, largest=False).indices
        candidates.append(nearest + start)
        start += count
    rows = torch.cat(candidates)  # (k, n)
    found = overlap.gather(0, rows)
    threshold = found.mean(0) + found.std(0)
    inside = torch.cat([centers.unsqueeze(1) - boxes[:, :2], boxes[:, 2:] - centers.unsqueeze(1)], -1).amin(-1) > 0.01
    good = (found >= threshold) & inside.gather(0, rows)
    wanted = torch.full_like(overlap, -1.0).scatter(0, rows, torch.where(good, found, -1.0))
    best, which = wanted.max(1)
    return torch.where(best >= 0, which, chosen)


class ATSSHead(FCOSHead):
    """FCOS's towers, convolutions without bias before their norms, one anchor per cell, and the losses of ATSS."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, 1, num_classes)
        for layer in (*self.classification_head.conv, *self.regression_head.conv):
            if isinstance(layer, nn.Conv2d):
                layer.bias = None
        self.deltas = DeltaCoder()

    def compute_loss(
        self, targets: list[dict[str, Tensor]], head_outputs: dict[str, Tensor], anchors: Maps, matched_idxs: Maps
    ) -> dict[str, Tensor]:
        """``classification`` (focal), ``bbox_regression`` (2 · GIoU) and ``bbox_ctrness``."""
        logits, deltas, centerness = (head_outputs[k] for k in ("cls_logits", "bbox_regression", "bbox_ctrness"))
        goal = torch.zeros_like(logits)
        found, wanted, center_goal, center_logit = [], [], [], []
        for b, (target, match, own) in enumerate(zip(targets, matched_idxs, anchors, strict=True)):
            positive = match >= 0
            goal[b, positive, target["labels"][match[positive]]] = 1
            boxes = target["boxes"][match[positive]]
            centers = (own[positive, :2] + own[positive, 2:]) / 2
            before, after = centers - boxes[:, :2], boxes[:, 2:] - centers
            ratio = torch.minimum(before, after) / torch.maximum(before, after)
            center_goal.append(ratio.prod(1).clamp(min=0).sqrt())
            center_logit.append(centerness[b, positive, 0])
            found.append(self.deltas.decode(deltas[b, positive], own[positive]))
            wanted.append(boxes)
        weight, count = torch.cat(center_goal), max(1, sum(len(boxes) for boxes in wanted))
        overlap = generalized_box_iou_loss(torch.cat(found), torch.cat(wanted), reduction="none")
        return {
            "classification": sigmoid_focal_loss(logits, goal, reduction="sum") / count,
            "bbox_regression": 2 * (overlap * weight).sum() / weight.sum().clamp(min=1e-6),
            "bbox_ctrness": F.binary_cross_entropy_with_logits(torch.cat(center_logit), weight, reduction="sum")
            / count,
        }


class ATSS(FCOS):
    """The detector; arguments as torchvision's FCOS, with an `ATSSHead` and one anchor per cell.

    Args:
        top_k: candidates per level and object.
    """

    def __init__(self, *args: Any, top_k: int = 9, **options: Any) -> None:
        super().__init__(*args, **options)
        self.box_coder: Any = DeltaCoder()
        self.top_k = top_k

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: Maps,
        num_anchors_per_level: list[int],
    ) -> dict[str, Tensor]:
        """Assign, then the head's losses."""
        matched = [
            assign(own, num_anchors_per_level, target["boxes"], top_k=self.top_k)
            for own, target in zip(anchors, targets, strict=True)
        ]
        head: Any = self.head
        return head.compute_loss(targets, head_outputs, anchors, matched)
