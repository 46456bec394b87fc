"""Functions stay short, or say why they are not."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 60  # lines besides signature and docstring


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node
        if isinstance(node, (ast.stmt, ast.excepthandler, ast.match_case)):  # no expression holds one
            yield from _functions(node)


def _length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[bool(ast.get_docstring(function)) and len(function.body) > 1]
    return (function.end_lineno or 0) - first.lineno + 1


def test_a_function_beyond_sixty_lines_says_why_it_is_whole() -> None:
    """By a comment ``# Whole: …`` above it. Kernels are exempt: their parts would pass on all tiles in registers."""
    silent = []
    for file in sorted([*ROOT.glob("packages/*/src/**/*.py"), *ROOT.glob("packages/*/tests/**/*.py"),
                        *ROOT.glob("tests/*.py"), *ROOT.glob("tools/*.py")]):  # fmt: skip
        text = file.read_text(encoding="utf-8")
        if text.count("\n") <= LIMIT:
            continue
        lines = text.splitlines()
        for function in _functions(ast.parse(text)):
            if _length(function) <= LIMIT or any("jit" in ast.unparse(mark) for mark in function.decorator_list):
                continue
            above = min([function.lineno, *(mark.lineno for mark in function.decorator_list)]) - 2
            if not lines[above].strip().startswith("# Whole: "):
                silent.append(f"{file.relative_to(ROOT)}:{function.lineno} {function.name}: {_length(function)} lines")
    assert not silent, "\n".join(silent)
