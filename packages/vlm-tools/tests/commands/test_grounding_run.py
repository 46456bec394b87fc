"""A run of sentence blocks: trained, predicted, exported; what needs a language model refuses it by name."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from attn_core.engine.run import open_run
from vlm_tools.commands.export import export_target
from vlm_tools.package import PACKAGE

Command = Callable[..., int]
SHORT = ["steps=2", "warmup=1", "batch_size=4", "val_dataloader.dataset.count=4", "test_dataloader.dataset.count=4"]


def test_sentence_blocks_are_trained_and_find_digits(
    command: Command, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    settings = [part for setting in SHORT for part in ("--set", setting)]
    assert command("train", "sentence_blocks_digits", "--out", str(run), *settings) == 0
    assert "iou" in capsys.readouterr().out
    assert (run / "predictions.png").is_file()
    assert command("predict", str(picture), "--run", str(run), "--out", str(out)) == 0
    assert (out / "scene_answers.png").is_file()
    assert "answers" in (out / "predictions.csv").read_text()
    capsys.readouterr()
    assert command("ask", str(picture), "is there a three", "--model", str(run)) == 1
    assert "a run of SentenceBlocks, which no one can ask; use a run of llava_digits" in capsys.readouterr().err
    target = export_target(open_run(PACKAGE, run, device="cpu"))
    with torch.no_grad():
        assert target.module(*target.inputs).shape == (2, 1, 36, 36)
