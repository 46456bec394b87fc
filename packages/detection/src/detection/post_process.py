"""From raw outputs to boxes: the best scores, class by class, and non-maximum suppression for detectors that need it.

The signature of `post_process_object_detection` is that of the image processors in Hugging Face's transformers.
Checked in: ``test_boxes.py``.
"""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.ops import batched_nms

from detection.boxes import cxcywh_to_xyxy


def post_process_object_detection(
    outputs: Mapping[str, Tensor],
    threshold: float = 0.5,
    target_sizes: Sequence[tuple[int, int]] | Int[Tensor, "B 2"] | None = None,
    top_k: int | None = 100,
) -> list[dict[str, Tensor]]:
    """``scores``, ``labels`` and ``boxes`` (xyxy) of each picture, best first.

    Args:
        outputs: ``pred_logits`` (B, Q, K), one sigmoid per class, and ``pred_boxes`` (B, Q, 4) cxcywh in [0, 1].
        threshold: scores must be above it.
        target_sizes: (Y, X) of each picture; boxes come in its pixels, without it in [0, 1].
        top_k: at most so many of the Q·K scores; None means one per query.

    Raises: ValueError if the number of sizes is not B.
    """
    logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
    if target_sizes is not None and len(target_sizes) != len(logits):
        raise ValueError(
            f"post_process_object_detection: target_sizes has {len(target_sizes)} entries for {len(logits)} pictures"
        )
    corners = cxcywh_to_xyxy(boxes)
    if target_sizes is not None:
        y, x = torch.as_tensor(target_sizes, dtype=corners.dtype, device=corners.device).unbind(1)
        corners = corners * torch.stack([x, y, x, y], 1)[:, None]
    scores, labels, chosen = top_scores(logits, logits.shape[1] if top_k is None else top_k)
    kept = scores > threshold
    return [
        {"scores": s[k], "labels": kind[k], "boxes": c[q[k]]}
        for s, kind, q, c, k in zip(scores, labels, chosen, corners, kept, strict=True)
    ]


def top_scores(
    logits: Float[Tensor, "B Q K"], k: int
) -> tuple[Float[Tensor, "B k"], Int[Tensor, "B k"], Int[Tensor, "B k"]]:
    """The k best sigmoid scores over all queries and classes, best first: scores, labels, queries."""
    classes = logits.shape[2]
    scores, index = logits.float().sigmoid().flatten(1).topk(min(k, logits.shape[1] * classes), dim=1)
    return scores, index % classes, index // classes


def suppress(found: Mapping[str, Tensor], iou: float, limit: int = 100) -> dict[str, Tensor]:
    """Greedy non-maximum suppression within each class: of boxes that overlap by more than ``iou`` the best stays.

    Raises: ValueError if ``iou`` is outside [0, 1].
    """
    if not 0 <= iou <= 1:
        raise ValueError(f"suppress: iou must be in [0, 1], got iou={iou}")
    kept = batched_nms(found["boxes"].float(), found["scores"].float(), found["labels"], iou)[:limit]
    return {key: value[kept] for key, value in found.items()}
