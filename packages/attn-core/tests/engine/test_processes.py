"""Several processes give what one gives."""

import json
import math
from pathlib import Path

import pytest
from safetensors.torch import load_file

SETTINGS = ("--set", "model.net.dropout=0.0", "--set", "epochs=3", "--set", "default_hooks.metrics.every_steps=1")


def _losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["split"] == "train"]


@pytest.fixture
def alone(command, tmp_path) -> Path:
    code, text = command("train", "--out", "alone", *SETTINGS)
    assert code == 0, text
    return tmp_path / "alone"


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_two_gloo_processes_equal_one_with_the_same_global_batch(command, tmp_path, alone, strategy):
    code, text = command("train", "--out", "two", *SETTINGS, "--strategy", strategy, processes=2)
    assert code == 0, text
    assert "2 × CPU" in text
    ours, expected = _losses(tmp_path / "two"), _losses(alone)
    assert len(ours) == len(expected) == 18
    assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 1e-5
    first, second = load_file(tmp_path / "two/step_18.safetensors"), load_file(alone / "step_18.safetensors")
    assert max(float((first[name] - second[name]).abs().max()) for name in second) < 1e-5
    assert (
        json.loads((tmp_path / "two/result.json").read_text())["test"]
        == json.loads((alone / "result.json").read_text())["test"]
    )


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_run_of_two_processes_resumes_in_one(command, tmp_path, alone, strategy):
    options = ("--out", "run", *SETTINGS, "--strategy", strategy)
    code, text = command("train", *options, processes=2, SIGNAL_AT_FORWARD="SIGTERM:9")
    assert code == 143, text
    code, text = command("train", "--out", "run", "--resume", "--strategy", "ddp")
    assert code == 0, text
    assert max(abs(a - b) for a, b in zip(_losses(tmp_path / "run"), _losses(alone), strict=True)) < 1e-5


def test_a_batch_size_that_cannot_be_divided_is_an_error(command):
    code, text = command("train", "--set", "train_dataloader.batch_size=7", processes=2)
    assert code == 2
    assert "batch_size=7 counts over all processes and must be a multiple of their number 2; use 8" in text


def test_a_bad_sample_of_one_process_stops_all_before_the_update(command, tmp_path):
    code, text = command("train", "--out", "run", "--set", "train_dataloader.dataset.bad=13", processes=2)
    assert code == 1
    assert "loss is nan on samples" in text
    assert "of process" in text
    assert "13" in text
    for path in (tmp_path / "run").glob("step_*.safetensors"):
        assert all(math.isfinite(float(tensor.sum())) for tensor in load_file(path).values())
