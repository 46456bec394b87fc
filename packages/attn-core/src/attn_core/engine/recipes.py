"""Recipe files: found by name, their bases put in place, run as the Python they are, and turned into plain data.

A recipe assigns settings (``model``, ``train_dataloader``, ...; see `attn_core.engine.config`) and plain variables that
they are computed from (``epochs``). It may import functions that compute settings (`warmup_cosine`), and it may begin
with another recipe, whose settings and variables it then changes::

    with read_base():
        from .digits import *
    epochs = 100
    model["net"] = dict(type=OtherNet)

A variable that is set from outside (``--set epochs=3``) has that value wherever it is assigned, in the base too.
"""

import ast
import contextlib
import copy
import difflib
import importlib.resources
import importlib.util
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attn_core.catalog import did_you_mean
from attn_core.engine.errors import ConfigError
from attn_core.engine.names import dotted_name

SETTINGS = {
    *("model", "data_preprocessor", "optim_wrapper", "param_scheduler", "default_hooks", "custom_hooks"),
    *("train_cfg", "val_cfg", "test_cfg", "val_evaluator", "test_evaluator"),
    *("train_dataloader", "val_dataloader", "test_dataloader"),
    *("randomness", "strategy", "device", "env_cfg", "default_scope", "load_from", "log_level", "visualizer"),
    *("compile", "sync_bn", "find_unused_parameters", "activation_checkpointing", "launcher", "experiment_name"),
}


@contextlib.contextmanager
def read_base() -> Iterator[None]:
    """Marks the imports of a recipe's bases; `read_recipe` puts their text in the place of the block."""
    yield


@dataclass(frozen=True)
class Recipe:
    """A recipe file that was read, not yet run.

    Attributes:
        path: The file.
        text: Its text with the bases in place: a recipe that needs no other file.
        variables: Plain variables whose values are literals.
        settable: Names of all plain variables, computed ones among them.
        about: The docstring.
    """

    path: Path
    text: str
    variables: dict[str, Any]
    settable: frozenset[str]
    about: str

    def run(self, changed: Mapping[str, Any]) -> dict[str, Any]:
        """The settings as plain data, with some variables changed; types are dotted names.

        Raises:
            ConfigError: if the file raises anything, or holds what cannot be written as a literal.
        """
        tree = ast.parse(self.text)
        for name, node in _assignments(tree):
            if name in changed:
                node.value = ast.copy_location(ast.parse(repr(changed[name]), mode="eval").body, node)
        names: dict[str, Any] = {"__name__": f"recipe_{self.path.stem}", "__file__": str(self.path)}
        try:
            exec(compile(ast.fix_missing_locations(tree), str(self.path), "exec"), names)
        except (Exception, SystemExit) as error:
            lines = [
                frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(self.path)
            ]
            where = f", line {lines[-1]}" if lines else ""
            raise ConfigError(f"recipe: {self.path}{where}: {type(error).__name__}: {error}") from None
        return {key: _plain(names[key], key) for key in sorted(SETTINGS & names.keys())}


def recipe_names(module: str) -> dict[str, str]:
    """Names of a package's recipes, with the first line of their docstrings."""
    folder = importlib.resources.files(module) / "configs"
    if not folder.is_dir():
        return {}
    files = [entry for entry in folder.iterdir() if entry.name.endswith(".py") and not entry.name.startswith("_")]
    return {
        entry.name.removesuffix(".py"): _docstring(entry.read_text(encoding="utf-8")).split("\n", 1)[0]
        for entry in sorted(files, key=lambda entry: entry.name)
    }


def find_recipe(module: str, recipe: str) -> Path:
    """The file of a recipe, by its name in the package or by its path.

    Raises:
        ConfigError: if there is none; the message holds the nearest name.
    """
    if recipe.endswith(".py") or "/" in recipe or "\\" in recipe:
        path = Path(recipe)
        if not path.is_file():
            raise ConfigError(f"train: there is no recipe file {recipe}")
        return path
    names = recipe_names(module)
    if recipe not in names:
        raise ConfigError(f"train: unknown recipe {recipe!r}{did_you_mean(recipe, names)}")
    return Path(str(importlib.resources.files(module) / "configs" / f"{recipe}.py"))


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file and its bases.

    Raises:
        ConfigError: if one of them cannot be read or parsed, or they read each other in a circle.
    """
    source, tree = _parse(path)
    spliced = _with_bases(path, tree, (path.resolve(),))
    _refuse_misspelled(path, tree)
    variables, settable = {}, set()
    for name, node in _assignments(tree):
        settable.add(name)
        with contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
            variables[name] = ast.literal_eval(node.value or ast.Constant(None))
    return Recipe(
        path=path,
        text=ast.unparse(tree) + "\n" if spliced else source,
        variables=variables,
        settable=frozenset(settable),
        about=ast.get_docstring(tree) or "",
    )


def read_literals(path: Path) -> dict[str, Any]:
    """The assignments of a file of literals, such as the ``config.py`` of a run; nothing in it is executed.

    Raises:
        ConfigError: if it cannot be read, or holds anything else.
    """
    config = {}
    for node in _parse(path)[1].body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # the docstring
        try:
            if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
                raise ValueError("only assignments are allowed")
            config[node.targets[0].id] = ast.literal_eval(node.value)
        except (ValueError, TypeError, MemoryError, RecursionError) as error:
            raise ConfigError(f"recipe: {path}, line {node.lineno}: {error}") from None
    return config


def _parse(path: Path) -> tuple[str, ast.Module]:
    try:
        source = path.read_text(encoding="utf-8-sig")
        return source, ast.parse(source)
    except (OSError, SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ConfigError(f"recipe: {path} cannot be read: {error}") from None


def _docstring(source: str) -> str:
    try:
        return ast.get_docstring(ast.parse(source)) or ""
    except SyntaxError:
        return "(cannot be parsed)"


def _assignments(tree: ast.Module) -> Iterator[tuple[str, ast.Assign | ast.AnnAssign]]:
    """Plain variables: module-level ``name = value`` that is no setting."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target: ast.expr = node.targets[0]
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            target = node.target
        else:
            continue
        if isinstance(target, ast.Name) and target.id not in SETTINGS and not target.id.startswith("_"):
            yield target.id, node


def _refuse_misspelled(path: Path, tree: ast.Module) -> None:
    """A variable that nothing reads and that nearly is the name of a setting was meant to be that setting."""
    read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
    for name, node in _assignments(tree):
        close = difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.85)
        if name not in read and close:
            raise ConfigError(
                f"recipe: {path}, line {node.lineno}: unknown setting {name!r}; did you mean {close[0]!r}?"
            )


def _with_bases(path: Path, tree: ast.Module, readers: tuple[Path, ...]) -> bool:
    """Put the statements of the bases in the place of ``with read_base():``; whether there was any."""
    body: list[ast.stmt] = []
    for node in tree.body:
        if not _reads_base(node):
            body.append(node)
            continue
        for statement in node.body:  # type: ignore[attr-defined]
            if not isinstance(statement, ast.ImportFrom):
                raise ConfigError(f"recipe: {path}, line {statement.lineno}: only from ... import * under read_base()")
            base = _base_file(path, statement)
            if base.resolve() in readers:
                raise ConfigError(f"recipe: {path}, line {statement.lineno}: {base} is read in a circle")
            below = _parse(base)[1]
            _with_bases(base, below, (*readers, base.resolve()))
            body += below.body[1:] if ast.get_docstring(below) is not None else below.body
    found = len(body) != len(tree.body) or any(map(_reads_base, tree.body))
    tree.body = body
    return found


def _reads_base(node: ast.stmt) -> bool:
    if not isinstance(node, ast.With) or len(node.items) != 1:
        return False
    call = node.items[0].context_expr
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "read_base"


def _base_file(path: Path, statement: ast.ImportFrom) -> Path:
    """The recipe that a ``from ... import`` names: relative to the file, or by its full module name."""
    module = statement.module or ""
    if statement.level:
        base = path.parent.joinpath(*[".."] * (statement.level - 1), *module.split("."))
        base = base.with_name(f"{base.name}.py")
    else:
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            spec = None
        base = Path(spec.origin) if spec and spec.origin else Path(f"{module}.py")
    if not base.is_file():
        raise ConfigError(f"recipe: {path}, line {statement.lineno}: there is no base {'.' * statement.level}{module}")
    return base


def _plain(value: Any, where: str) -> Any:
    """Numbers, strings, None, lists, tuples and dicts of them, in new containers; classes by their dotted names."""
    if value is None or type(value) in (bool, int, float, str):
        return copy.copy(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        items = [_plain(item, f"{where}.{index}") for index, item in enumerate(value)]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, np.generic):
        return value.item()
    if callable(value) and hasattr(value, "__qualname__"):
        return dotted_name(value)
    raise ConfigError(
        f"recipe: {where} is a {type(value).__name__}; recipes hold numbers, strings, lists, dicts, and classes or "
        "functions that can be imported"
    )
