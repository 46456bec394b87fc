"""Without the extra a command is one line that names it, and an import says the same."""

import subprocess
import sys
from pathlib import Path

import pytest

from attn_core.deferred import running_command
from attn_core.engine.extras import NEEDED, require

ROOT = Path(__file__).resolve().parents[4]


@pytest.mark.parametrize("package", sorted(file.parent.name for file in ROOT.glob("packages/*/pyproject.toml")))
def test_every_package_with_a_command_is_recognized(package: str) -> None:
    has_command = "[project.scripts]" in (ROOT / "packages" / package / "pyproject.toml").read_text(encoding="utf-8")
    for program in (f"/usr/bin/{package}", f"/lib/{package.replace('-', '_')}/__main__.py"):
        assert running_command(program) == (package if has_command else None)
    assert running_command("/usr/bin/pytest") is None
    assert running_command(f"scripts/{package}.py") is None  # a user's own


def test_a_missing_package_is_one_line_for_a_command_and_an_error_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/usr/bin/seq-models", "--help"])
    line = r"seq-models: training and commands need no_such_x; install the extra: pip install 'seq-models\[train\]'"
    with pytest.raises(SystemExit, match=line):
        require(("no_such_x", *NEEDED))
    monkeypatch.setattr(sys, "argv", ["script.py"])
    with pytest.raises(ImportError, match=r"attn-core: .* need no_such_x; .*'attn-core\[train\]'"):
        require(("no_such_x",))


def test_the_first_import_of_a_command_ends_in_that_line() -> None:
    """In a process that finds no mmengine, as after ``pip install ./packages/seq-models``."""
    program = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "mmengine" else found(name, *a)
sys.argv = ["/usr/bin/seq-models", "--help"]
import attn_core.engine
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("seq-models: training and commands need mmengine; install the extra")
