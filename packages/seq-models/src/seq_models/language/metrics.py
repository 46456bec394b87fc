"""Scores of causal language models."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from attn_core.engine import Metric
from seq_models.data.language import ByteText, counted_bits

NATS_PER_BIT = 0.6931471805599453


class TokenScore(Metric):
    """``bits_per_token`` (of bytes: bits per byte) and ``accuracy`` over all counted tokens, ``solved``: the share of
    rows without a mistake.
    """

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:  # noqa: ARG002  mmengine's signature
        """Keep the sums of each sample: nats, counted tokens, hits, all of them hit."""
        self.results += [
            (row["nats"], row["tokens"], row["hits"], row["hits"] == row["tokens"]) for row in data_samples
        ]

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Bits per counted token, share of hits among them, share of samples without a miss."""
        nats, tokens, hits, solved = torch.tensor(results, dtype=torch.float64).sum(0).tolist()
        tokens = max(tokens, 1.0)
        return {
            "bits_per_token": nats / tokens / NATS_PER_BIT,
            "accuracy": hits / tokens,
            "solved": solved / len(results),
        }


class TextScore(TokenScore):
    """`TokenScore` and ``bits_per_byte``, which does not depend on the tokenizer: of `seq_models.data.TokenText`."""

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """Bits per token, shared out among the bytes that a token stands for on the whole part of the text."""
        found = super().compute_metrics(results)
        meta: Any = self.dataset_meta
        return {**found, "bits_per_byte": found["bits_per_token"] / meta["bytes_per_token"]}


class ByteScore(TokenScore):
    """`TokenScore` and ``counted_bits``: what a table of counts of the training text needs for the same bytes.

    Args:
        text: as of `seq_models.data.ByteText`, whose training part is counted. order: of the table, 0 to 2.
    """

    def __init__(self, text: str | Path | Sequence[str | Path] | None = None, order: int = 2) -> None:
        super().__init__()
        self.text, self.order = text, order
        self.windows: list[np.ndarray] = []

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Any]]) -> None:
        """As ``TokenScore``, and keep the windows themselves for the counting model."""
        super().process(data_batch, data_samples)
        self.windows += [np.asarray(ids).astype(np.uint8) for ids in data_batch["input_ids"]]

    def compute_metrics(self, results: list[Any]) -> dict[str, float]:
        """``TokenScore``'s metrics, and the bits per byte of a model that counts the training text."""
        windows, self.windows = np.stack(self.windows), []
        trained = ByteText("train", length=windows.shape[1], text=self.text).windows.ravel()
        return {**super().compute_metrics(results), "counted_bits": counted_bits(self.order, trained, windows)}
