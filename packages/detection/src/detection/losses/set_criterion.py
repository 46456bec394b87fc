"""Plain-DETR's set losses: focal, L1 and GIoU for each decoder layer, hybrid matching, the proposal stage.

Source: https://github.com/impiga/Plain-DETR, ``models/detr.py`` (SetCriterion) and ``engine.py`` (train_hybrid); hybrid
matching: Jia et al., CVPR 2023, arXiv 2207.13080. The same: every number. Checked in:
``losses/test_set_criterion.py``.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, distributed

from detection.boxes import cxcywh_to_xyxy, deltas_of, giou
from detection.matchers import hungarian_match

ALPHA = 0.25
CLASS_COST = 2.0
Targets = Sequence[Mapping[str, Tensor]]


def focal_loss(logits: Float[Tensor, "*n"], target: Float[Tensor, "*n"]) -> Float[Tensor, "*n"]:
    """Sigmoid focal loss with α = 0.25 and γ = 2 (Lin et al., arXiv 1708.02002), element by element."""
    p = logits.sigmoid()
    hit = p * target + (1 - p) * (1 - target)
    weight = ALPHA * target + (1 - ALPHA) * (1 - target)
    return weight * (1 - hit) ** 2 * F.binary_cross_entropy_with_logits(logits, target, reduction="none")


class HybridCriterion:
    """Weighted losses ``loss_class``, ``loss_box``, ``loss_giou``, each with the endings ``_<layer>``, ``_proposals``
    and, for the queries that share objects, ``_many``.

    Args:
        repeats: how often each object may be found by the second group of queries.
        many_weight: of the second group's losses.
        proposal_classes: the proposal stage learns classes; otherwise all its objects are of the first.
        match_anchors: proposals are matched by their anchors alone, so that in every step the same one learns an
            object; officially by what they predict. Needs ``pred_boxes_old``.
        class_weight: of the class losses; the matching always weighs classes with 2.
        box_weight: 5 for normalized boxes, 1 for deltas in pixels.

    Raises: ValueError if ``repeats`` is below 1.
    """

    def __init__(
        self,
        *,
        repeats: int = 6,
        many_weight: float = 1.0,
        class_weight: float = 2.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        proposal_classes: bool = False,
        match_anchors: bool = False,
    ) -> None:
        if repeats < 1:
            raise ValueError(f"HybridCriterion: repeats must be at least 1, got repeats={repeats}")
        self.repeats = repeats
        self.many_weight = many_weight
        self.class_weight = class_weight
        self.box_weight = box_weight
        self.giou_weight = giou_weight
        self.proposal_classes = proposal_classes
        self.match_anchors = match_anchors

    def __call__(self, outputs: Mapping[str, Any], targets: Targets) -> dict[str, Float[Tensor, ""]]:
        """Losses of the outputs of `detection.models.plain_detr.detector.PlainDETR.outputs`.

        Args:
            targets: per picture ``labels`` (N,) and ``boxes`` (N, 4) cxcywh, in [0, 1] of the picture or in pixels, as
                the model's boxes are.
        """
        count = _count(targets, outputs["layers"][0]["pred_logits"])
        losses = {}
        for index, layer in enumerate(outputs["layers"]):
            losses |= self._one(layer, targets, count, f"_{index}")
        wanted = targets
        if not self.proposal_classes:
            wanted = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
        losses |= self._one(outputs["proposals"], wanted, count, "_proposals", by_anchor=self.match_anchors)
        if outputs["layers_many"]:
            many = [{"labels": target["labels"].repeat(self.repeats), "boxes": target["boxes"].repeat(self.repeats, 1)}
                    for target in targets]  # fmt: skip
            count = _count(many, outputs["layers"][0]["pred_logits"])
            for index, layer in enumerate(outputs["layers_many"]):
                found = self._one(layer, many, count, f"_{index}_many")
                losses |= {name: value * self.many_weight for name, value in found.items()}
        return losses

    def _one(
        self, layer: Mapping[str, Tensor], targets: Targets, count: Tensor, ending: str, *, by_anchor: bool = False
    ) -> dict[str, Tensor]:
        seen = layer
        if by_anchor:
            anchors = layer["pred_boxes_old"]
            seen = {"pred_logits": torch.zeros_like(layer["pred_logits"]), "pred_boxes": anchors,
                    "pred_deltas": torch.zeros_like(anchors), "pred_boxes_old": anchors}  # fmt: skip
        matches = hungarian_match(
            seen, targets, class_cost=CLASS_COST, box_cost=self.box_weight, giou_cost=self.giou_weight
        )
        logits = layer["pred_logits"]
        picture = torch.cat([torch.full_like(query, index) for index, (query, _) in enumerate(matches)])
        query = torch.cat([query for query, _ in matches])
        labels = torch.cat([target["labels"][own] for target, (_, own) in zip(targets, matches, strict=True)])
        boxes = torch.cat([target["boxes"][own] for target, (_, own) in zip(targets, matches, strict=True)])
        onehot = torch.zeros_like(logits)
        onehot[picture, query, labels] = 1
        found = layer["pred_boxes"][picture, query]
        if "pred_deltas" in layer:
            wanted = deltas_of(layer["pred_boxes_old"][picture, query], boxes)
            distance = (layer["pred_deltas"][picture, query] - wanted).abs()
        else:
            distance = (found - boxes).abs()
        overlap = giou(cxcywh_to_xyxy(found), cxcywh_to_xyxy(boxes))
        return {
            f"loss_class{ending}": self.class_weight * focal_loss(logits, onehot).sum() / count,
            f"loss_box{ending}": self.box_weight * distance.sum() / count,
            f"loss_giou{ending}": self.giou_weight * (1 - overlap).sum() / count,
        }


def _count(targets: Targets, like: Tensor) -> Tensor:
    """Objects per process, at least 1."""
    total = like.new_tensor(float(sum(len(target["labels"]) for target in targets)))
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(total)
        total = total / distributed.get_world_size()
    return total.clamp(min=1)
