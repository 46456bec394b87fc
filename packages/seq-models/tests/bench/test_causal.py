"""The benchmark of causal models gives rows for training and decoding."""

from typing import Any

import pytest
import torch

from attn_core.engine import BenchmarkRequest
from seq_models.bench import causal, titans


def test_rows_name_both_rules_and_both_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("REPEATS", 1), ("LENGTH", 32), ("SHORT", 4), ("LONG", 16), ("DECODED", 1)):
        monkeypatch.setattr(causal, name, value)
    monkeypatch.setattr(causal, "_peer", lambda _: None)  # its hooks warn
    request = BenchmarkRequest(["test_routing", "test_transnormer"], 1, torch.device("cpu"), None)
    rows: list[Any] = list(causal.benchmark_causal(request))
    assert [row["model"] for row in rows] == [
        "test_routing (topk, as the peer)",
        "test_routing (causal)",
        "test_transnormer",
        "test_transnormer",
    ]
    assert [row["ratio"] for row in rows[:2]] == ["–", "–"]
    assert rows[3]["ratio"] == "1.00"
    assert "after 16 (beside: 4), bytes" in rows[3]["quantity"]


def test_titans_rows_compare_both_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("REPEATS", 1), ("TOKENS", 8), ("WIDTH", 4), ("CHUNK", 4)):
        monkeypatch.setattr(titans, name, value)
    monkeypatch.setattr(titans, "_against_peer", lambda *_: None)  # its hooks warn
    rows: list[Any] = list(causal.benchmark_causal(BenchmarkRequest(["test_titans_lmm"], 1, torch.device("cpu"), None)))
    assert [row["model"] for row in rows] == ["titans memory (beside: token by token)"]
    assert float(rows[0]["ratio"]) > 0
