"""Curves: few panels, one axis per kind of metric, nothing twice."""

import json
import struct

import pytest

from attn_core.engine.pictures import _panels, draw_curves


def _rows(scores, losses=("loss",), rates=("base_lr", "lr"), steps=40):
    train = [
        {"split": "train", "step": s, "epoch": 0, "seconds": 1.0, "grad_norm": 2.0, **dict.fromkeys(losses, 1 / s),
         **dict.fromkeys(rates, 0.001 / s)}
        for s in range(1, steps)
    ]  # fmt: skip
    val = [{"split": "val", "step": s, "epoch": 0, **dict.fromkeys(scores, s / steps)} for s in range(10, steps, 10)]
    return [*train, *val]


def _size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


MANY = [f"{kind}_{part}" for kind in ("dice", "hd95", "assd", "recall", "precision", "volume") for part in "abcdefghij"]


@pytest.mark.parametrize(
    ("scores", "columns", "rows"),
    [
        ([], 2, 1), (["accuracy"], 3, 1), (["accuracy", "accuracy_top5"], 3, 1), (["AP", "AP50", "recall"], 2, 2),
        (MANY, 3, 2),
    ],
)  # fmt: skip
def test_curves_fit_on_a_page(tmp_path, scores, columns, rows):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _rows(scores)))
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png", chosen=20)
    assert _size(tmp_path / "curves.png") == (360 * columns, 280 * rows)


def test_metrics_of_one_kind_share_an_axis():
    panels = _panels(_rows(["AP", "AP50", "AP_small", "recall", "loss_box"], losses=("loss", "loss_class")))
    assert {title: [line.name for line in lines] for title, lines in panels.items()} == {
        "loss": ["loss", "loss class", "validation loss box"],
        "validation AP": ["AP", "AP50", "AP small"],
        "validation recall": ["recall"],
        "learning rate": ["lr"],
    }


def test_rates_that_differ_are_both_drawn():
    rows = _rows([])
    for row in (row for row in rows if row["split"] == "train"):
        row["base_lr"] = 2 * row["lr"]
    assert [line.name for line in _panels(rows)["learning rate"]] == ["lr", "base lr"]


def test_a_metric_that_is_never_a_number_and_an_empty_run_are_no_error(tmp_path):
    rows = [{"split": "val", "step": 1, "epoch": 1, "iou": None, "accuracy": 0.5}]
    assert list(_panels(rows)) == ["validation accuracy"]
    (tmp_path / "metrics.jsonl").write_text("")
    draw_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
