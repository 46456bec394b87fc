"""A run that is killed or stopped, and resumed, ends as the run that was never disturbed."""

import json
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file


def _final(run: Path) -> dict[str, Any]:
    """Everything that a run leaves behind, without the clock."""
    step = max(run.glob("step_*.safetensors"), key=lambda path: int(path.stem.split("_")[1]))
    best = next(iter(run.glob("best_step_*.safetensors")))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds")
    state = torch.load(run / f"{step.stem}.state.pt", weights_only=True)
    state["hooks"]["MetricsHook"].pop("bytes")
    return {
        "weights": {name: tensor.numpy().tobytes() for name, tensor in load_file(step).items()},
        "best": (best.name, best.read_bytes()),
        "metrics": lines,
        "test": json.loads((run / "result.json").read_text())["test"],
        "state": _bytes(state),
    }


def _bytes(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: _bytes(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_bytes(item) for item in value]
    return value


def test_kill_9_and_resume_end_in_the_same_bits(command, tmp_path):
    """Epochs; killed before the first checkpoint, in mid-epoch, in a validation, and in the middle of a write."""
    assert command("train", "--out", "whole")[0] == 0
    code, text = command("train", "--out", "killed", SIGNAL_AT_FORWARD="SIGKILL:3")
    assert code == -signal.SIGKILL, text
    assert command("train", "--out", "killed", "--resume", SIGNAL_AT_FORWARD="SIGKILL:17")[0] == -signal.SIGKILL
    assert command("train", "--out", "killed", "--resume", KILL_AT_RENAME="5")[0] == -signal.SIGKILL
    assert list((tmp_path / "killed").glob(".*.writing"))
    assert command("train", "--out", "killed", "--resume", SIGNAL_AT_FORWARD="SIGKILL:16")[0] == -signal.SIGKILL
    code, text = command("train", "--out", "killed", "--resume")
    assert code == 0, text
    assert _final(tmp_path / "killed") == _final(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*.writing"))


def test_resume_is_exact_with_loader_workers_and_training_counted_in_steps(command, tmp_path):
    options = ("--set", "train_cfg.val_interval=7", "--set", "train_dataloader.num_workers=2")
    recipe = tmp_path / "points_steps.py"
    source = (Path(__file__).parent / "tiny_task/configs/points.py").read_text()
    recipe.write_text(source.replace("max_epochs=epochs, val_interval=1", "by_epoch=False, max_iters=31"))
    assert command("train", str(recipe), "--out", "whole", "--set", "train_cfg.val_interval=7")[0] == 0
    code, text = command("train", str(recipe), "--out", "killed", *options, SIGNAL_AT_FORWARD="SIGKILL:23")
    assert code == -signal.SIGKILL, text
    assert command("train", "--out", "killed", "--resume")[0] == 0
    assert _final(tmp_path / "killed") == _final(tmp_path / "whole")


@pytest.mark.parametrize(
    ("name", "code", "forward"), [("SIGTERM", 143, "8"), ("SIGINT", 130, "8"), ("SIGTERM", 143, "13")]
)
def test_a_signal_saves_at_the_step_boundary_and_exits_with_its_code(command, tmp_path, name, code, forward):
    found, text = command("train", "--out", "run", SIGNAL_AT_FORWARD=f"{name}:{forward}")
    assert found == code, text
    step = re.search(rf"tiny train: {name}: stopped after step (\d+); saved \S+; continue with --resume", text)
    assert step, text
    assert "Traceback" not in text
    assert (tmp_path / f"run/step_{step[1]}.json").exists()
    if forward == "13":
        assert command("train", "--out", "run", "--resume")[0] == 0
        assert command("train", "--out", "whole")[0] == 0
        assert _final(tmp_path / "run") == _final(tmp_path / "whole")


def test_mmengines_moving_average_is_refused(command):
    code, text = command("train", "--out", "run", "--set", "custom_hooks.0.type=mmengine.hooks.EMAHook")
    assert code == 2
    assert "custom_hooks: mmengine's EMAHook is not supported; use attn_core.engine.EMAHook" in text


def test_two_runs_with_one_seed_are_equal_in_every_bit_and_another_seed_is_not(command, tmp_path):
    for out, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        assert command("train", "--out", out, "--seed", seed, "--set", "epochs=2")[0] == 0
    assert _final(tmp_path / "a") == _final(tmp_path / "b")
    assert _final(tmp_path / "a")["weights"] != _final(tmp_path / "c")["weights"]


def test_loader_workers_do_not_change_the_result(command, tmp_path):
    for out, workers in (("a", "0"), ("b", "2")):
        settings = ("--set", "epochs=2", "--set", f"train_dataloader.num_workers={workers}")
        assert command("train", "--out", out, *settings)[0] == 0
    assert _final(tmp_path / "a") == _final(tmp_path / "b")
