"""Metrics that more than one package reports."""

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric

Metric = BaseMetric


class Accuracy(Metric):
    """Share of samples whose label is among the k highest scores, in [0, 1].

    Reads ``{"scores": (K,), "label": int}`` per sample. Names: ``accuracy`` for k=1, ``accuracy_top5`` for k=5.

    Args:
        topk: The values of k.
    """

    def __init__(self, topk: Sequence[int] = (1,)) -> None:
        super().__init__()
        self.topk = tuple(topk)

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:  # noqa: ARG002  mmengine's signature
        """Keep the rank of the right class: 0 is a hit."""
        for sample in data_samples:
            scores = torch.as_tensor(sample["scores"])
            self.results.append(int((scores > scores[sample["label"]]).sum()))

    def compute_metrics(self, results: list[int]) -> dict[str, float]:
        """Shares over all samples of all processes."""
        names = {k: "accuracy" if k == 1 else f"accuracy_top{k}" for k in self.topk}
        return {name: sum(rank < k for rank in results) / max(1, len(results)) for k, name in names.items()}
