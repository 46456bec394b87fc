"""Every code block of every README and page: Python is executed, shell commands must name things that exist."""

import contextlib
import importlib.util
import io
import re
import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(ROOT.glob("packages/*/README.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
VERBS = {"train", "eval", "predict", "export", "benchmark", "list", "info", "--help"}


def _scripts() -> set[str]:
    files = ROOT.glob("packages/*/pyproject.toml")
    return {script for file in files for script in tomllib.loads(file.read_text("utf-8"))["project"].get("scripts", {})}


def _blocks(page: Path) -> list[tuple[str, str]]:
    return FENCE.findall(page.read_text(encoding="utf-8"))


def _name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(kind == "python" for kind, _ in _blocks(page))], ids=_name
)
def test_python_blocks_run_and_print_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of a page share their names; a ``text`` block behind one is what it prints."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__readme__"}
    blocks = _blocks(page)
    for number, (kind, body) in enumerate(blocks):
        if kind != "python":
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(body, f"{_name(page)}, block {number + 1}", "exec"), namespace)
        if number + 1 < len(blocks) and blocks[number + 1][0] == "text":
            assert printed.getvalue() == blocks[number + 1][1]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(kind == "bash" for kind, _ in _blocks(page))], ids=_name
)
def test_shell_blocks_name_programs_and_paths_that_exist(page: Path) -> None:
    for kind, body in _blocks(page):
        if kind != "bash":
            continue
        for line in body.replace("\\\n", " ").splitlines():
            for command in re.split(r"&&|\|\||[|;]", line):
                words = shlex.split(command, comments=True)
                if words:
                    _check(words, f"{_name(page)}: {line.strip()}")


def _check(words: list[str], where: str) -> None:
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]  # variables before the command
    if words[:2] == ["uv", "run"]:
        words = words[2:]
    while words[0].startswith("-"):
        words = words[1:]
    program, *arguments = words
    if program in _scripts():
        assert arguments, where
        assert arguments[0] in VERBS, where
    elif program == "torchrun":
        module = arguments[arguments.index("-m") + 1]
        assert importlib.util.find_spec(module), where
    elif program == "python" and arguments[:1] == ["-m"]:
        module = arguments[1].partition(".")[0] if arguments[1] == "venv" else arguments[1]
        assert importlib.util.find_spec(module), where
        assert importlib.util.find_spec(f"{module}.__main__") or module in ("venv", "attn_core.aot"), where
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), where
    elif "/" in program:
        assert (ROOT / program).is_file(), where
    else:
        assert program in {"pip", "uv", "pytest", "ruff", "pyright", "git", "cd", "pre-commit"}, where
    for word in arguments:
        if word.startswith(("./", "packages/", "tools/", "tests/", "docs/")):
            assert (ROOT / word.partition("[")[0].partition("::")[0]).exists(), where
