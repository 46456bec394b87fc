"""The command line, called in this process."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from attn_core.engine.cli import run_cli
from medical_seg.cli import CLI

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """(exit code, stdout, stderr) of a call in a scratch folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["medical-seg", *arguments])
        with pytest.raises(SystemExit) as stop:
            run_cli(CLI, arguments)
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return call
