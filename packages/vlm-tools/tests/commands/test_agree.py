"""``vlm-tools agree``: readings of an answer and of scenes, and one line for each misuse."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.filterwarnings("ignore")
Command = Callable[..., int]
TWO = ("--reading", "attention", "--reading", "occlusion", "--permutations", "5")


def test_readings_of_an_answer_and_of_scenes_are_compared(
    command: Command, run: Path, picture: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", str(run), *TWO)
    assert command("agree", str(picture), *arguments, "--tokens", "3", "--steps", "2", "--top-k", "2") == 0
    printed = capsys.readouterr().out
    assert "weighted tau" in printed
    assert "random order" in printed
    assert "pointing game" not in printed
    file = tmp_path / "out" / "agreement.json"
    assert command("agree", *arguments, "--scenes", "2", "--steps", "0", "--out", str(file)) == 0
    printed = capsys.readouterr().out
    assert "pointing game" in printed
    assert "random order" not in printed
    assert set(json.loads(file.read_text())["hits"]) == {"attention", "occlusion", "chance"}


def test_misuse_is_one_line(command: Command, run: Path, picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("agree", str(picture), "--reading", "atention", "--model", str(run)) == 1
    assert "--reading atention: unknown reading; did you mean 'attention'?" in capsys.readouterr().err
    assert command("agree", str(picture), "--reading", "flow", "--model", str(run)) == 1
    assert "--reading flow: agreement needs two readings or more" in capsys.readouterr().err
    assert command("agree", "nosuch.png", *TWO, "--model", str(run)) == 1
    assert "nosuch.png: No such file" in capsys.readouterr().err
