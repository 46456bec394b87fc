"""Training of BMN: what is learned and found, runs from the command line, and those that are killed."""

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
from detection.data.events import ClassStreams, collate_events
from detection.metrics.events import Events, EventScores
from detection.models.bmn.network import BMN, Boundaries
from detection.tasks.events import EventTask, name_proposals, propose

TINY: dict[str, Any] = {"features": 16, "steps": 32, "width": 8, "pair_width": 8, "map_width": 4, "bins": 4}


def task(classes: int = 8, **options: Any) -> EventTask:
    torch.manual_seed(0)
    return EventTask({"type": BMN, **TINY, **options}, classes=classes)


def batch(count: int = 4) -> dict[str, Any]:
    data = ClassStreams("val", limit=count)
    return collate_events([data[index] for index in range(count)])


def test_proposals_are_scored_by_start_end_and_pair() -> None:
    torch.manual_seed(0)
    maps = Boundaries(torch.rand(2, 2, 5, 5), torch.rand(2, 5), torch.rand(2, 5))
    valid = torch.ones(5, 5).triu() - torch.ones(5, 5).triu(3)  # at most three steps
    for row, own in enumerate(propose(maps, valid)):
        expected = {}
        for i in range(5):
            for j in range(i, min(i + 3, 4)):
                pair = maps.pairs[row, 0, i, j] * maps.pairs[row, 1, i, j]
                expected[i / 5, (j + 1) / 5] = (pair * maps.start[row, i] * maps.end[row, j + 1]).item()
        found = {(start, end): score for (start, end), score in zip(own.segments.tolist(), own.scores, strict=True)}
        assert found == pytest.approx(expected)


def test_a_proposal_has_the_class_of_its_scores() -> None:
    features = torch.zeros(5, 10)  # two streams of two classes, and a channel that belongs to none
    features[0, :5], features[2, :5], features[3, 5:], features[4] = 0.9, 0.5, 0.6, 9.0
    found = Events(np.array([[0.0, 0.5], [0.5, 1.0], [0.4, 0.5]]), np.array([0.5, 0.5, 1.0]), np.zeros(3, np.int64))
    named = name_proposals(found, features, 2)
    assert named.labels.tolist() == [0, 1, 0]
    assert named.scores.tolist() == pytest.approx([0.35, 0.15, 0.7])
    assert name_proposals(found, features, 0) is found
    with pytest.raises(ValueError, match=r"classes must be 0…16, the features, got classes=17"):
        task(17)


def test_perfect_maps_find_the_events_and_their_classes() -> None:
    model, data = task(), batch()
    rows = model.predict(**data)
    perfect = Boundaries(data["overlaps"][:, None].expand(-1, 2, -1, -1), data["starts"] + 0.1, data["ends"] + 0.1)
    for row, own, features in zip(rows, propose(perfect, model.net.valid()), data["features"], strict=True):
        named = name_proposals(own, features, 8)
        row["found"] = Events(named.segments * row["duration"], named.scores, named.labels)
    measured = EventScores().compute_metrics(rows)
    assert measured["mAP@0.50"] > 0.95
    assert measured["AR@10"] > 0.8


def test_gradient_steps_lower_the_loss() -> None:
    model, data = task(csa="sum", se=True), batch(2)
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    losses, found = [], {}
    for _ in range(5):
        torch.manual_seed(0)
        found = model.loss(**data)
        loss = torch.stack(list(found.values())).sum()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert set(found) == {"loss_boundary", "loss_regression", "loss_class"}
    assert losses[-1] < losses[0] - 0.02


def test_semantics_of_their_own_reach_the_attention() -> None:
    model, data = task(csa="sum", semantics=3), batch(2)
    torch.nn.init.normal_(model.net.csa.time.weight)  # pyright: ignore[reportOptionalMemberAccess]
    found = [model.predict(**data, semantics=torch.full((2, 3, 32), level))[0]["found"].scores for level in (0.0, 2.0)]
    assert not np.array_equal(*found)
    torch.manual_seed(0)
    assert all(value.isfinite() for value in model.loss(**data, semantics=torch.rand(2, 3, 32)).values())


def command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        run_cli(CLI, list(arguments))
    return int(caught.value.code or 0)


def small(out: Path, *settings: str) -> list[str]:
    values = (
        *("epochs=2", "batch=4", "train_cfg.val_interval=1", "default_hooks.checkpoint.every_epochs=1", *settings),
        *(f"model.net.{key}={value}" for key, value in list(TINY.items())[2:]),
        *(f"{part}_dataloader.dataset.limit={count}" for part, count in {"train": 8, "val": 3, "test": 3}.items()),
    )
    return ["train", "bmn_events", "--out", str(out), "--device", "cpu", *(p for v in values for p in ("--set", v))]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "bmn"
    assert command(*small(directory, "csa=sum", "se=True")) == 0
    return directory


def test_a_run_measures_its_proposals_and_draws_them(run: Path) -> None:
    measured = json.loads((run / "result.json").read_text())["test"]
    assert {"AR@1", "AR@100", "AUC", "mAP", "mAP@0.50"} <= set(measured)
    assert all(math.isfinite(value) for value in measured.values())
    page = np.asarray(Image.open(run / "predictions.png"))
    assert page.shape[1] < 1100
    assert page.std() > 20


@pytest.mark.slow
def test_a_killed_run_resumes_and_ends_as_the_undisturbed_one(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, "-m", "detection", *small(out, "csa=sum", "se=True")],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ})  # fmt: skip
    try:
        while not list(out.glob("step_*.safetensors")) and process.poll() is None:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert command("train", "--resume", "--out", str(out), "--device", "cpu") == 0
    ended, expected = (json.loads((path / "result.json").read_text())["test"] for path in (out, run))
    assert ended == pytest.approx(expected, nan_ok=True)
