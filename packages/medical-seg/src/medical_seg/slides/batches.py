"""Bags of different size in one batch."""

from collections.abc import Sequence
from typing import Any

import torch


def padded(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Stack bags, with zeros behind the shorter ones: the ``collate_fn`` of every slide data set.

    Items: features (N, C) float32 with N ≥ 1, label int.
    Batch: features (B, largest N, C), mask (B, largest N) true where an instance is, label (B,).
    """
    sizes = [len(item["features"]) for item in items]
    features = torch.zeros(len(items), max(sizes), items[0]["features"].shape[1])
    mask = torch.zeros(features.shape[:2], dtype=torch.bool)
    for row, (item, size) in enumerate(zip(items, sizes, strict=True)):
        features[row, :size] = item["features"]
        mask[row, :size] = True
    return {"features": features, "mask": mask, "label": torch.tensor([item["label"] for item in items])}
