"""One-to-one assignment of queries to objects by the least total cost (DETR, arXiv 2005.12872).

Costs as in https://github.com/impiga/Plain-DETR, ``models/matcher.py``. Checked in: ``losses/test_set_criterion.py``.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from detection.boxes import cxcywh_to_xyxy, deltas_of, pairwise_giou

ALPHA = 0.25


@torch.no_grad()
def hungarian_match(
    outputs: Mapping[str, Tensor],
    targets: Sequence[Mapping[str, Tensor]],
    *,
    class_cost: float = 2.0,
    box_cost: float = 5.0,
    giou_cost: float = 2.0,
) -> list[tuple[Int[Tensor, " M"], Int[Tensor, " M"]]]:
    """Per picture the matched queries and their objects.

    Args:
        outputs: ``pred_logits`` (B, Q, K), ``pred_boxes`` (B, Q, 4) cxcywh. With ``pred_deltas`` and ``pred_boxes_old``
            (B, Q, 4) the box cost is that of the deltas.
        targets: per picture ``labels`` (N,) and ``boxes`` (N, 4) cxcywh in the same units.

    Raises: ValueError if a cost is not finite, which means that the model has diverged.
    """
    from scipy.optimize import linear_sum_assignment

    matches = []
    for index, target in enumerate(targets):
        p = outputs["pred_logits"][index].sigmoid()
        negative = (1 - ALPHA) * p**2 * -torch.log(1 - p + 1e-8)
        positive = ALPHA * (1 - p) ** 2 * -torch.log(p + 1e-8)
        boxes = outputs["pred_boxes"][index]
        if "pred_deltas" in outputs:
            wanted = deltas_of(outputs["pred_boxes_old"][index][:, None], target["boxes"][None])
            distance = (outputs["pred_deltas"][index][:, None] - wanted).abs().sum(-1)
        else:
            distance = torch.cdist(boxes, target["boxes"], p=1)
        cost = (
            box_cost * distance
            + class_cost * (positive - negative)[:, target["labels"]]
            - giou_cost * pairwise_giou(cxcywh_to_xyxy(boxes), cxcywh_to_xyxy(target["boxes"]))
        ).cpu()
        if not torch.isfinite(cost).all():
            raise ValueError(
                f"hungarian_match: {int((~torch.isfinite(cost)).sum())} costs of picture {index} are not finite; "
                "the model has diverged or a target box is empty"
            )
        query, object_ = linear_sum_assignment(cost.numpy())
        device = boxes.device
        matches.append((torch.as_tensor(query, device=device), torch.as_tensor(object_, device=device)))
    return matches
