"""A run that was killed and resumed has the weights of one that was not, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from vlm_tools.digits.task import DigitsLlavaTask

pytestmark = pytest.mark.filterwarnings("ignore")
SETTINGS = ["steps=6", "warmup=1", "batch_size=4", "val_dataloader.dataset.count=4", "test_dataloader.dataset.count=4",
            "default_hooks.checkpoint.every_steps=2"]  # fmt: skip


@pytest.mark.slow
def test_a_killed_and_resumed_run_has_the_weights_of_an_uninterrupted_one(
    command: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert command("train", "--out", str(whole), "--seed", "3", *settings) == 0
    loss, calls = DigitsLlavaTask.loss, []

    def failing(self: DigitsLlavaTask, **batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:  # after the checkpoint of step 4, and a step that is lost
            raise OSError("killed")
        return loss(self, **batch)

    monkeypatch.setattr(DigitsLlavaTask, "loss", failing)
    assert command("train", "--out", str(broken), "--seed", "3", *settings) == 1
    monkeypatch.undo()
    assert command("train", "--out", str(broken), "--resume") == 0
    weights = [load_file(run / "step_6.safetensors") for run in (whole, broken)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
