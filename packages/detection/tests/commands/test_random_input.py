"""Whatever is typed behind the verbs of this package: an exit code and at most one line, never a traceback."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from attn_core.engine.cli import run_cli
from detection.cli import CLI

NUMBERS = st.sampled_from(["-1", "0", "0.3", "2", "nan", "inf", "1e400", "x", "", "0x1", "9" * 400]) | st.text(
    max_size=5
)
NAMES = st.text(max_size=12) | st.sampled_from(
    ["train", "empty", "file.json", "list.json", "..", "a\0b", "~", "/", "a" * 300]
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders and files that look a little like data."""
    root = tmp_path_factory.mktemp("place")
    (root / "empty").mkdir()
    (root / "train").mkdir()
    (root / "train" / "_annotations.coco.json").write_text("{}")
    (root / "file.json").write_text("nonsense")
    (root / "list.json").write_text(json.dumps({"images": [1], "annotations": [], "categories": []}))
    return root


def test_names_that_move_the_cursor_are_shown_as_they_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_cli(CLI, ["check", "a\x1b[2Kc"])
    assert capsys.readouterr().err == "detection check: a\\x1b[2Kc does not exist\n"


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_random_arguments_end_in_an_exit_code_and_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], data: st.DataObject
) -> None:
    path = str(place / data.draw(NAMES)) if data.draw(st.booleans()) else data.draw(NAMES.filter(lambda t: t != "~"))
    number = data.draw(NUMBERS)
    arguments = data.draw(
        st.sampled_from(
            [
                ["check", path],
                ["check", path, "--labels", number],
                ["check", path, "--turned", number],
                ["check", str(place / "list.json"), "--images", path],
                ["train", "own_pictures", "-d", path, "--out", str(place / "run")],
                [
                    "train",
                    "own_pictures",
                    "-d",
                    str(place / "train"),
                    "--out",
                    str(place / "run"),
                    "--set",
                    f"side={number}",
                ],
                ["predict", path, "--run", str(place / "empty"), "--threshold", number],
                ["ring3d", str(place / "out"), "--split", path],
                ["ring3d", str(place / "out"), "--count", f"-{number}"],
                ["info", path],
                ["export", f"{place}/{number}"],
            ]
        )
    )
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run_cli(CLI, arguments)
    shown = capsys.readouterr().err.strip().splitlines()
    assert caught.value.code in (0, 1, 2), (arguments, shown)
    assert len([line for line in shown if not line.startswith("note: ")]) <= 1, (arguments, shown)
    assert not (place / "run").exists()
