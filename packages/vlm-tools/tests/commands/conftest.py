"""A run of a few steps, a picture, and the command in this process."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from attn_core.engine.cli import run_cli
from vlm_tools.cli import CLI
from vlm_tools.data import scene

SHORT = ["steps=4", "warmup=1", "batch_size=8", "val_dataloader.dataset.count=12", "test_dataloader.dataset.count=12"]
Command = Callable[..., int]


def _command(*arguments: str) -> int:
    with pytest.raises(SystemExit) as caught:
        run_cli(CLI, list(arguments))
    return int(caught.value.code or 0)


@pytest.fixture(scope="session")
def command() -> Command:
    """``vlm-tools`` with the given arguments; gives its exit code."""
    return _command


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of llava_digits, four steps long."""
    directory = tmp_path_factory.mktemp("runs") / "llava_digits"
    assert _command("train", "--out", str(directory), *(part for s in SHORT for part in ("--set", s))) == 0
    return directory


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A scene of the digits world."""
    shown = scene("test", 1003)
    Image.fromarray((shown.image * 255).astype("uint8")).save(tmp_path / "scene.png")
    return tmp_path / "scene.png"
