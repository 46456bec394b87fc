"""Every console script of the members keeps the same contract: verbs, help, exit codes, one-line errors."""

import importlib.metadata
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest

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
