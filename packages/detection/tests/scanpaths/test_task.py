"""Training of scanpath networks: what is learned from, measured and drawn, and runs that are killed."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from attn_core.engine.cli import run_cli
from detection.cli import CLI
from detection.scanpaths.oat import OAT
from detection.scanpaths.shelves import DigitShelves, collate_shelves
from detection.scanpaths.task import ScanpathScores, ScanpathTask, named, next_labels

TINY: dict[str, Any] = {"rows": 3, "columns": 9, "crop_size": (32, 24), "pyramid": 2, "dim": 56, "ffn_dim": 16,
                        "encoder_layers": 1, "decoder_layers": 1}  # fmt: skip
SETTINGS = (
    "epochs=2",
    "warmup=1",
    "train_cfg.val_interval=1",
    "default_hooks.checkpoint.every_epochs=1",
    "model.samples=2",
    *(f"model.net.{key}={value}" for key, value in list(TINY.items())[4:]),
    *(f"{part}_dataloader.dataset.limit={count}" for part, count in {"train": 40, "val": 4, "test": 4}.items()),
)


def task(**options: Any) -> ScanpathTask:
    torch.manual_seed(0)
    return ScanpathTask({"type": OAT, **TINY}, **options).eval()


def batch(count: int = 3) -> dict[str, Any]:
    data = DigitShelves("val", limit=count)
    return collate_shelves([data[index] for index in range(count)])


def test_each_step_learns_the_next_object_and_the_last_one_end() -> None:
    path = torch.tensor([[4, 4, 2], [7, -1, -1]])
    assert next_labels(path, 27).tolist() == [[4, 4, 2, 27], [7, 27, -100, -100]]
    model, data = task(), batch(2)
    scores = model.net(data["crops"], data["target"], data["path"]).log_softmax(-1)
    terms = []
    for row, own in enumerate(data["path"].tolist()):
        truth = [place for place in own if place >= 0]
        terms += [-scores[row, step, label] for step, label in enumerate([*truth, 27])]
    torch.testing.assert_close(model.loss(**data)["loss"], torch.stack(terms).mean())


def test_equal_best_scores_share_a_hit() -> None:
    scores = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]]])
    assert named(scores, torch.tensor([[1, 0]])).tolist() == [[0.5, 0.0]]


def test_predictions_hold_what_the_measures_need_and_draw_alike() -> None:
    model, data = task(samples=3, max_length=4), batch()
    with torch.no_grad():
        found, again = model.predict(**data), model.predict(**data)
        other = task(samples=3, max_length=4, seed=1).predict(**data)
    assert [one["drawn"] for one in found] == [one["drawn"] for one in again] != [one["drawn"] for one in other]
    for one in found:
        assert len(one["drawn"]) == 3
        assert all(1 <= len(path) <= 4 for path in [*one["drawn"], one["likely"]])
        assert {len(hits) for hits in one["hits"].values()} == {len(one["truth"]) + 1}
        assert set(one["hits"]) == {"oat", "uniform", "nearest", "similarity", "possible"}
    metric = ScanpathScores()
    metric.process(None, found)
    names = metric.compute_metrics(metric.results)
    assert {"next_accuracy", "next_accuracy_possible", "sequence_score", "multimatch_shape", "delta", "length",
            "truth_length"} <= set(names)  # fmt: skip
    assert all(math.isfinite(value) for value in names.values())
    with pytest.raises(ValueError, match="samples must be at least 1, got samples=0"):
        task(samples=0)


def test_whoever_repeats_the_truth_scores_one() -> None:
    cells = np.stack(np.divmod(np.arange(27), 9), 1)
    truth = [13, 14, 14, 22, 13]
    hits = {"oat": [1.0] * 6, "uniform": [0.5, 0.0, 0.0, 0.0, 0.0, 1.0]}
    one = {"truth": truth, "likely": truth, "drawn": [truth], "target": 13, "cells": cells, "hits": hits}
    found = ScanpathScores().compute_metrics([one, one])
    perfect = ("next_accuracy", "sequence_score", "sequence_score_drawn", "multimatch_shape", "multimatch_position")
    assert all(found[name] == pytest.approx(1) for name in perfect)
    assert found["next_accuracy_uniform"] == 0.25
    assert found["delta"] == 0
    assert (found["search"], found["refixation"], found["revisit"]) == pytest.approx((0.6, 0.2, 0.2))
    assert found["truth_correct_target"] == 1


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        run_cli(CLI, list(arguments))
    return int(caught.value.code or 0)


def small(out: Path) -> list[str]:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    return ["train", "oat_shelves", "--out", str(out), "--device", "cpu", *settings]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "oat"
    assert command(*small(directory)) == 0
    return directory


def test_a_run_measures_itself_beside_the_baselines_and_draws_its_searches(run: Path) -> None:
    measured = json.loads((run / "result.json").read_text())["test"]
    assert {"next_accuracy", "next_accuracy_uniform", "next_accuracy_nearest", "next_accuracy_similarity",
            "next_accuracy_possible", "delta"} <= set(measured)  # fmt: skip
    page = np.asarray(Image.open(run / "predictions.png"))
    assert page.shape[1] < 1100
    assert page.std() > 20


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_as_the_undisturbed_one(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-m", "detection", *small(out)], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, env={**os.environ})  # fmt: skip
    try:
        while not list(out.glob("step_*.safetensors")) and process.poll() is None:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert command("train", "--resume", "--out", str(out), "--device", "cpu") == 0
    ended, expected = (json.loads((path / "result.json").read_text())["test"] for path in (out, run))
    assert ended == pytest.approx(expected, nan_ok=True)


def test_scanpath_draws_shelves_of_json(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("shelves", str(tmp_path / "in"), "--count", "2", "--split", "val") == 0
    files = sorted(map(str, (tmp_path / "in").glob("*.json")))
    assert files == capsys.readouterr().out.split()
    out = tmp_path / "out"
    assert command("scanpath", *files, "--run", str(run), "--out", str(out), "--samples", "2", "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    for index, line in enumerate(lines):
        written = json.loads((out / f"val_{index}.json").read_text())
        assert " → ".join(map(str, written["likely"])) in line
        assert len(written["drawn"]) == 2
        with torch.no_grad():
            item = DigitShelves("val")[index]
            assert written["target"] == item["target"]
        height, width, _ = np.asarray(Image.open(out / f"val_{index}.png")).shape
        assert width < 1100
        assert height > 4 * 380  # likely, two drawn, recorded
    assert command("scanpath", files[0], "--run", str(run), "--out", str(tmp_path / "b"), "--device", "cpu") == 0
    assert len(np.asarray(Image.open(tmp_path / "b" / "val_0.png"))) < 3 * 420


def test_mistakes_of_scanpath_end_in_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (80, 40)).save(tmp_path / "s.png")
    small_shelf, other = tmp_path / "s.json", tmp_path / "o" / "s.json"
    small_shelf.write_text(json.dumps({"picture": "s.png", "rows": 1, "columns": 2, "target": 0}))
    other.parent.mkdir()
    other.write_text(json.dumps({"picture": "../s.png", "rows": 1, "columns": 2, "target": 0}))
    for arguments, message in (
        (
            ("scanpath", str(small_shelf), "--run", str(run)),
            "the shelf has 1 × 2 objects, the network knows",
        ),
        (("scanpath", str(small_shelf), str(other), "--run", str(run)), "two shelves are called s.json"),
        (("scanpath", str(tmp_path / "gone.json"), "--run", str(run)), "gone.json: not a json file"),
        (("scanpath", str(small_shelf), "--samples", "-1"), "--samples must be 0…1000, got -1"),
        (("shelves", str(tmp_path / "x"), "--count", "0"), "--count must be 1…200 for split test, got 0"),
        (("shelves", str(tmp_path / "x"), "--split", "all"), "--split must be train, val or test, got all"),
        (("predict", str(tmp_path / "s.png"), "--run", str(run)), "not a run of a detector of boxes in pictures"),
    ):
        capsys.readouterr()
        assert command(*arguments) == 1, arguments
        shown = capsys.readouterr().err
        assert message in shown, (arguments, shown)
        assert len(shown.strip().splitlines()) == 1, shown
    assert not (tmp_path / "x").exists()


def test_a_gradient_step_lowers_the_loss() -> None:
    model, data = task(), batch()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(6):
        loss = model.loss(**data)["loss"]
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]
    assert losses[0] == pytest.approx(math.log(29), rel=0.3)
