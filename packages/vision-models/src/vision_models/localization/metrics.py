"""Shares of pictures whose box is found: GT-known, top-1, top-5 and MaxBoxAccV2."""

from collections.abc import Sequence
from typing import Any

import torch

from attn_core.engine import Metric
from vision_models.localization.boxes import iou, largest_boxes

IOUS = (0.3, 0.5, 0.7)


class Localization(Metric):
    """How often the box of a map fits a box of the picture.

    Reads ``{"scores": (K,), "label": int, "map": (Y, X) in [0, 1], "boxes": (M, 4)}`` per sample.

    ``gt_known`` at IoU .5, ``top1_loc`` and ``top5_loc`` where the class is right as well, ``accuracy``; each at the
    threshold of the map, among ``thresholds``, for which GT-known and top-1 together are highest *on the same
    pictures*, as papers do: with a single threshold nothing is chosen. ``max_box_acc_v2``: the mean over IoU .3, .5
    and .7 of the best share over thresholds from 0 to 1 in steps of ``step``.

    Args:
        thresholds: of the map.
        step: of the thresholds of MaxBoxAccV2.
    """

    def __init__(self, thresholds: Sequence[float] = (0.3, 0.35, 0.4, 0.45), step: float = 0.05) -> None:
        super().__init__()
        if not thresholds or not all(0 <= t < 1 for t in thresholds):
            raise ValueError(f"Localization: thresholds must lie in [0, 1), got thresholds={thresholds}")
        if not 0 < step <= 0.5:
            raise ValueError(f"Localization: step must lie in (0, 0.5], got step={step}")
        self.thresholds = tuple(thresholds)
        self.every = tuple(round(i * step, 6) for i in range(round(1 / step)))

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:  # noqa: ARG002  mmengine's signature
        """Keep the rank of the right class, and the best overlap at each threshold."""
        for sample in data_samples:
            scores = torch.as_tensor(sample["scores"])
            rank = int((scores > scores[sample["label"]]).sum())
            found = torch.as_tensor(sample["map"])[None]
            truth = torch.as_tensor(sample["boxes"]).reshape(-1, 4)
            overlaps = [
                float(iou(largest_boxes(found, threshold), truth).max())
                for threshold in (*self.thresholds, *self.every)
            ]
            self.results.append((rank, overlaps))

    def compute_metrics(self, results: list[tuple[int, list[float]]]) -> dict[str, float]:
        """Shares over all pictures of all processes."""
        if not results:
            return {}
        ranks = torch.tensor([rank for rank, _ in results])
        overlaps = torch.tensor([row for _, row in results], dtype=torch.float64)
        count = len(self.thresholds)
        hits = (overlaps[:, :count] >= 0.5).double()
        known, first = hits.mean(0), (hits * (ranks < 1)[:, None]).mean(0)
        best = int((known + first).argmax())
        swept = [(overlaps[:, count:] >= bound).double().mean(0).max().item() for bound in IOUS]
        return {
            "gt_known": known[best].item(),
            "top1_loc": first[best].item(),
            "top5_loc": (hits[:, best] * (ranks < 5)).mean().item(),
            "accuracy": (ranks < 1).double().mean().item(),
            "threshold": self.thresholds[best],
            "max_box_acc_v2": sum(swept) / len(swept),
        }
