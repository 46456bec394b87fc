"""``tools/result_table.py``: results of runs beside published numbers."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool, at work in a workspace of one package with two published numbers and no results."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import result_table  # pyright: ignore[reportMissingImports]

    monkeypatch.setattr(result_table, "ROOT", tmp_path)
    monkeypatch.setattr(result_table, "size_of", size_of)
    package = tmp_path / "packages" / "one"
    (package / "results").mkdir(parents=True)
    (package / "README.md").write_text("# one\n\n<!-- results -->\n<!-- /results -->\n\nend\n", encoding="utf-8")
    rows = [
        {"recipe": "a", "metric": "exact", "unit": "%", "paper": 0.92, "what": "right ones"},
        {"recipe": "b", "metric": "length", "unit": "", "paper": None, "what": "mean length"},
    ]
    (package / "results" / "published.json").write_text(json.dumps(rows), encoding="utf-8")
    return result_table


def size_of(run: Path, _package: str) -> dict[str, Any]:
    """What the tool finds by opening the run; the seed is the last figure of its name."""
    return {"seed": int(run.name[-1]), "parameters": 1_234_567, "multiply_adds": None}


def run_of(directory: Path, recipe: str, test: dict[str, float], *words: str) -> Path:
    """A run directory as ``train`` leaves it."""
    directory.mkdir()
    about: dict[str, Any] = dict.fromkeys(("started", "python", "machine", "device", "versions", "data_info"), "x")
    about |= {"package": "one", "recipe": recipe, "commands": [["one", "train", recipe, *words]]}
    (directory / "run.json").write_text(json.dumps(about), encoding="utf-8")
    (directory / "result.json").write_text(json.dumps({"test": test, "processor_seconds": 90.0}), encoding="utf-8")
    return directory


def command(tool: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["result_table.py", *words])
    return tool.main()


def test_a_result_is_kept_and_stands_beside_the_published_number(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tool, monkeypatch, "--check") == 1
    assert "out of date" in capsys.readouterr().err
    run = run_of(tmp_path / "run0", "b", {"length": 2.1234})
    assert command(tool, monkeypatch, "add", str(run)) == 0
    readme = (tmp_path / "packages/one/README.md").read_text(encoding="utf-8")
    assert "| `a` | right ones | – | – | 92.0 % | not run | – |\n" in readme
    assert "| `b` | mean length | 1.23 M | – | – | 2.123 | 1.5 |\n<!-- /results -->\n\nend\n" in readme
    assert command(tool, monkeypatch, "--check") == 0


def test_seeds_are_summed_up_and_a_repeated_one_counts_once(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "run0", tmp_path / "run1", tmp_path / "again0"]
    runs = [run_of(folder, "a", {"exact": exact}) for folder, exact in zip(folders, (0.1, 0.8, 0.9), strict=True)]
    assert command(tool, monkeypatch, "add", *map(str, runs)) == 0
    readme = (tmp_path / "packages/one/README.md").read_text(encoding="utf-8")
    assert "| 85.0 % (80.0 % to 90.0 %, 2 seeds) | 1.5 |" in readme


def test_changed_settings_stand_in_a_row_of_their_own(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = run_of(tmp_path / "changed0", "a", {"exact": 0.5}, "--set", "steps=1")
    assert command(tool, monkeypatch, "add", str(changed)) == 0
    readme = tmp_path / "packages/one/README.md"
    assert "50.0 %" not in readme.read_text(encoding="utf-8")
    published = tmp_path / "packages/one/results/published.json"
    rows = json.loads(published.read_text(encoding="utf-8"))
    published.write_text(json.dumps([*rows, rows[0] | {"settings": ["steps=1"]}]), encoding="utf-8")
    assert command(tool, monkeypatch) == 0
    assert "| `a --set steps=1` | right ones | 1.23 M | – | 92.0 % | 50.0 % | 1.5 |" in readme.read_text(
        encoding="utf-8"
    )


def test_an_unfinished_run_is_refused(
    tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(tool, monkeypatch, "add", str(tmp_path)) == 1
    assert "holds no finished run" in capsys.readouterr().err
