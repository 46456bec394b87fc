"""Every console script of the members keeps the same contract: verbs, help, exit codes, one-line errors."""

import importlib.metadata
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from attn_core.engine.prepare import TrainOptions
from attn_core.engine.results import TrainResult

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    script
    for file in sorted(ROOT.glob("packages/*/pyproject.toml"))
    for script in tomllib.loads(file.read_text(encoding="utf-8"))["project"].get("scripts", {})
]
VERBS = ["train", "eval", "predict", "export", "benchmark", "list", "info"]

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Call a console script's entry point in this process: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(script: str, *arguments: str) -> tuple[int, str, str]:
        (entry,) = importlib.metadata.entry_points(group="console_scripts", name=script)
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit) as stop:
            entry.load()()
        printed = capsys.readouterr()
        return int(stop.value.code or 0), printed.out, printed.err

    return call


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_script_is_installed_and_its_help_names_every_verb(script: str, run: Run) -> None:
    assert os.access(Path(sys.executable).parent / script, os.X_OK)
    code, printed, error = run(script, "--help")
    assert code == 0, error
    for verb in VERBS:
        assert verb in printed


def test_an_installed_script_runs() -> None:
    program = Path(sys.executable).parent / SCRIPTS[-1]
    done = subprocess.run(
        [program, "--help"], capture_output=True, encoding="utf-8", check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_every_verb_has_help(script: str, verb: str, run: Run) -> None:
    code, printed, _ = run(script, verb, "--help")
    assert code == 0
    assert "Usage" in printed


@pytest.mark.parametrize(
    ("arguments", "expected", "words"),
    [
        (["tarin"], 2, "did you mean 'train'?"),
        (["train", "--ressume"], 2, "did you mean --resume?"),
        (["train", "no_such_recipe"], 2, "unknown recipe 'no_such_recipe'"),
        (["train", "--set", "no_such_setting=1"], 2, "unknown setting 'no_such_setting'"),
        (["train", "--launcher", "mpi"], 2, "mpi"),
        (["eval", "no_such_run"], 1, "no_such_run"),
        (["predict", "no_such_file"], 1, "no_such_file does not exist"),
        (["info", "no_such_model"], 2, "no_such_model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_mistake_is_one_line_and_an_exit_code(
    script: str, arguments: list[str], expected: int, words: str, run: Run
) -> None:
    code, _, error = run(script, *arguments)
    assert code == expected, error
    lines = error.strip().splitlines()
    assert len(lines) == 1, error
    assert lines[0].startswith(script)
    assert words in lines[0]


@pytest.mark.slow  # each list builds all models of its package, without weights
@pytest.mark.parametrize("script", SCRIPTS)
def test_list_names_what_info_describes(script: str, run: Run) -> None:
    code, printed, _ = run(script, "list")
    assert code == 0
    name = printed.splitlines()[-1].split()[0]
    assert "test_" not in printed
    code, described, error = run(script, "info", name)
    assert code == 0, error
    assert name in described


def test_programs_of_the_core_have_help() -> None:
    modules = ["attn_core.bench", "attn_core.aot"]
    program = f"""
import contextlib, runpy, sys
for module in {modules}:
    sys.argv[1:] = ["--help"]
    with contextlib.suppress(SystemExit):
        runpy.run_module(module, run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    for module in modules:
        assert module in done.stdout


@pytest.mark.parametrize(
    ("script", "option", "recipe"),
    [
        ("detection", "--data", "own_pictures"),
        ("medical-seg", "--data", "volumes"),
        ("seq-models", "--text", "transnormer_text"),
        ("vision-models", "--data", "pictures"),
    ],
)
def test_data_of_ones_own_without_a_recipe_choose_the_one_made_for_them(
    script: str, option: str, recipe: str, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun: list[TrainOptions] = []

    def train(_: object, options: TrainOptions, **__: object) -> TrainResult:
        begun.append(options)
        return TrainResult(directory=tmp_path)

    monkeypatch.setattr("attn_core.engine.train.train", train)
    data = _data_of_ones_own(script, tmp_path / "own")
    code, _, error = run(script, "train", option, str(data))
    assert code == 0, error
    assert [options.recipe for options in begun] == [recipe]


@pytest.mark.parametrize(("script", "recipe"), [("vision-models", "biformer_digits"), ("detection", "bvr_digits")])
def test_a_recipe_without_a_place_for_data_says_so_of_the_option(
    script: str, recipe: str, run: Run, tmp_path: Path
) -> None:
    data = _data_of_ones_own(script, tmp_path / "own")
    code, _, error = run(script, "train", recipe, "--data", str(data))
    assert (code, len(error.splitlines())) == (2, 1), error
    assert "--data: this recipe has no setting 'data_root'" in error


def _data_of_ones_own(script: str, folder: Path) -> Path:
    """The least that the command takes for data: two classes of pictures, boxes, a case, or a text."""
    folder.mkdir()
    if script == "seq-models":
        (folder / "mine.txt").write_text("a text", encoding="utf-8")
    elif script == "medical-seg":
        for kind in ("images", "masks"):
            (folder / kind).mkdir()
            for case in range(5):
                table = [x // 128 if kind == "masks" else x for x in range(256)]
                Image.linear_gradient("L").point(table).save(folder / kind / f"case{case}.png")
    else:
        for name in ("cat", "dog"):
            (folder / name).mkdir()
            Image.new("RGB", (16, 16), "red").save(folder / name / "1.png")
        picture = {"id": 1, "file_name": "cat/1.png", "width": 16, "height": 16}
        box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 2, 8, 8], "area": 64, "iscrowd": 0}
        boxes = {"images": [picture], "annotations": [box], "categories": [{"id": 1, "name": "cat"}]}
        if script == "detection":
            (folder / "boxes.json").write_text(json.dumps(boxes), encoding="utf-8")
    return folder
