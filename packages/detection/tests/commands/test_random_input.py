"""Whatever is typed behind the verbs of this package: an exit code and at most one line, never a traceback."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attn_core.engine.cli import run_cli
from attn_core.testing.commands import assert_foreseen, bad_inputs
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


PATH, NUMBER = "PATH", "NUMBER"  # where a random one stands
CALLS = {
    "check": [
        ["check", PATH],
        ["check", PATH, "--labels", NUMBER],
        ["check", PATH, "--turned", NUMBER],
        ["check", "{place}/list.json", "--images", PATH],
    ],
    "train": [
        ["train", "own_pictures", "-d", PATH, "--out", "{place}/run"],
        ["train", "own_pictures", "-d", "{place}/train", "--out", "{place}/run", "--set", f"side={NUMBER}"],
        ["train", PATH, "--out", "{place}/run", "--device", NUMBER],
    ],
    "predict": [["predict", PATH, "--run", "{place}/empty", "--threshold", NUMBER], ["predict", PATH, "--run", PATH]],
    "ring3d": [["ring3d", "{place}/out", "--split", PATH], ["ring3d", "{place}/out", f"--count=-{NUMBER}"]],
    "shelves": [["shelves", "{place}/out", "--split", PATH], ["shelves", "{place}/out", f"--count=-{NUMBER}"]],
    "scanpath": [
        ["scanpath", PATH, "--run", "{place}/empty"],
        ["scanpath", "{place}/list.json", PATH, "--samples", NUMBER],
        ["scanpath", "{place}/file.json", "--run", PATH],
    ],
    "info": [["info", PATH]],
    "export": [["export", f"{{place}}/{NUMBER}"], ["export", PATH, "--format", NUMBER]],
    "eval": [["eval", PATH], ["eval", "{place}/empty", "--split", NUMBER]],
    "benchmark": [["benchmark", PATH], ["benchmark", "--batch-size", f"-{NUMBER}"], ["benchmark", "--device", PATH]],
}


@pytest.mark.parametrize("verb", CALLS)
@bad_inputs
@given(data=st.data())
def test_random_arguments_end_in_an_exit_code_and_one_line(place: Path, verb: str, data: st.DataObject) -> None:
    path = str(place / data.draw(NAMES)) if data.draw(st.booleans()) else data.draw(NAMES.filter(lambda t: t != "~"))
    number = data.draw(NUMBERS)
    given_ = data.draw(st.sampled_from(CALLS[verb]))
    arguments = [word.replace("{place}", str(place)) for word in given_]
    arguments = [word.replace(NUMBER, number) if word != PATH else path for word in arguments]
    assert_foreseen(CLI, *arguments)
    assert not (place / "run").exists()
