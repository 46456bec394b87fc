"""Every code block of every README and page: Python is executed, shell commands must name things that exist."""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from attn_core.engine.cli import build_cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted(ROOT.glob("packages/*/README.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _scripts() -> set[str]:
    files = ROOT.glob("packages/*/pyproject.toml")
    return {script for file in files for script in tomllib.loads(file.read_text("utf-8"))["project"].get("scripts", {})}


@functools.cache
def _options(script: str) -> dict[str, set[str]]:
    """Verb → long options of a console script; the verb of a group is ``slides train``."""
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name=script)
    task = importlib.import_module(entry.module).CLI
    commands = typer.main.get_command(build_cli(task)).commands  # pyright: ignore[reportAttributeAccessIssue]
    inner = {f"{name} {verb}": one for name in task.groups for verb, one in commands[name].commands.items()}
    commands = {verb: command for verb, command in (commands | inner).items() if verb not in task.groups}
    return {
        verb: {"--help", *(name for option in command.params for name in (*option.opts, *option.secondary_opts))}
        for verb, command in commands.items()
    }


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
            for words in _commands(line):
                _check(words, f"{_name(page)}: {line.strip()}")


def _commands(line: str) -> Iterator[list[str]]:
    """The commands of a line, split at |, && and ;, without comments."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;")
    lexer.whitespace_split = True
    for is_operator, words in itertools.groupby(lexer, key=lambda word: set(word) <= set("|&;")):
        if not is_operator:
            yield list(words)


def _check(words: list[str], where: str) -> None:
    words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)]  # variables before the command
    if words[:2] == ["uv", "run"]:
        words = words[2:]
    while words[0].startswith("-"):
        words = words[2:] if words[0] == "--group" else words[1:]
    program, *arguments = words
    if program in _scripts():
        verbs = _options(program)
        assert arguments, where
        if " ".join(arguments[:2]) in verbs:
            arguments = [" ".join(arguments[:2]), *arguments[2:]]
        assert arguments[0] in verbs, where
        given = {argument.partition("=")[0] for argument in arguments if argument.startswith("--")}
        assert given <= verbs[arguments[0]], where
    elif program == "torchrun":
        module = arguments[arguments.index("-m") + 1]
        assert importlib.util.find_spec(module), where
    elif program == "python" and arguments[:1] == ["-m"]:
        assert importlib.util.find_spec(arguments[1]), where
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), where
    elif "/" in program:
        assert (ROOT / program).is_file(), where
    elif program == "bash":
        assert (ROOT / arguments[0]).is_file(), where
    else:
        assert program in {"pip", "uv", "pytest", "ruff", "pyright", "git", "cd", "pre-commit"}, where
    for word in arguments:
        if word.startswith(("./", "packages/", "tools/", "tests/", "docs/")):
            assert (ROOT / word.partition("[")[0].partition("::")[0]).exists(), where
