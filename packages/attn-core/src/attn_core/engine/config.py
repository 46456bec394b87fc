"""Recipes: found by name, completed with defaults, overridden, checked, and written next to the results."""

import ast
import importlib.resources
import pprint
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.config.utils import ConfigParsingError

from attn_core.engine.errors import ConfigError
from attn_core.engine.names import accepted_arguments, resolve
from attn_core.registry import did_you_mean

_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")
_KEYS = {
    *("model", "data_preprocessor", "optim_wrapper", "param_scheduler", "default_hooks", "custom_hooks"),
    *("train_cfg", "val_cfg", "test_cfg", "val_evaluator", "test_evaluator", *_LOADERS),
    *("randomness", "strategy", "device", "env_cfg", "default_scope", "load_from", "log_level", "visualizer"),
    *("compile", "sync_bn", "find_unused_parameters", "activation_checkpointing", "launcher", "experiment_name"),
}
_LOADER_KEYS = {
    *("dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "collate_fn", "num_workers", "drop_last"),
    *("pin_memory", "persistent_workers", "prefetch_factor", "timeout", "multiprocessing_context", "worker_init_fn"),
}
# Dicts without a "type", by the end of their path.
_GROUPS = {
    **dict.fromkeys(_LOADERS, _LOADER_KEYS),
    "train_cfg": {"by_epoch", "max_epochs", "max_iters", "val_begin", "val_interval", "dynamic_intervals"},
    "val_cfg": {"fp16"},
    "test_cfg": {"fp16"},
    "optim_wrapper": {"optimizer", "amp", "accumulative_counts", "clip_grad", "constructor", "paramwise_cfg"},
    "clip_grad": {"type", "max_norm", "norm_type", "error_if_nonfinite", "foreach", "clip_value"},
    "paramwise_cfg": {
        *("custom_keys", "norm_decay_mult", "bias_lr_mult", "bias_decay_mult", "dwconv_decay_mult"),
        *("flat_decay_mult", "bypass_duplicate", "dcn_offset_lr_mult", "num_layers", "decay_rate"),
    },
    "randomness": {"seed", "deterministic"},
    "strategy": {"type", "units"},
    "env_cfg": {"cudnn_benchmark"},
}
_ADDED_BY_REGISTRIES = {"type", "_scope_"}
_HOOK = "attn_core.engine.hooks"
_REPORT = "attn_core.engine.reporting"
_DEFAULT_HOOKS: dict[str, dict[str, Any]] = {
    "runtime_info": {"type": "mmengine.hooks.RuntimeInfoHook"},
    "param_scheduler": {"type": "mmengine.hooks.ParamSchedulerHook"},
    "metrics": {"type": f"{_REPORT}.MetricsHook"},
    "progress": {"type": f"{_REPORT}.ProgressHook"},
    "checkpoint": {"type": f"{_HOOK}.CheckpointHook"},
    "signals": {"type": f"{_HOOK}.SignalHook"},
}


def recipe_names(module: str) -> dict[str, str]:
    """Names of a package's recipes, with the first line of their docstrings."""
    folder = importlib.resources.files(module) / "configs"
    if not folder.is_dir():
        return {}
    files = [entry for entry in folder.iterdir() if entry.name.endswith(".py") and not entry.name.startswith("_")]
    return {
        entry.name.removesuffix(".py"): _first_line(entry.read_text(encoding="utf-8"))
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


def load_recipe(
    path: Path, overrides: Sequence[str] = (), *, scope: str = "mmengine", literal: bool = False
) -> dict[str, Any]:
    """Read a recipe, or the resolved ``config.py`` of a run, and complete, override and check it.

    Args:
        path: The file.
        literal: Accept only assignments of literals, as in the ``config.py`` of a run; nothing is executed.
        overrides: ``"a.b=c"`` settings; c is a Python literal, or else a string. A plain variable of the recipe file
            (``epochs = 40``) can be set as well, and changes everything that is computed from it.
        scope: Registry scope in which names without dots are looked up.

    Returns:
        The recipe as nested dicts, lists and literals; types are dotted names.

    Raises:
        ConfigError: if the file or an override is wrong.
    """
    try:
        source = path.read_text(encoding="utf-8")
        tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"recipe: {path} cannot be read: {error}") from None
    settings = [_parse(override) for override in overrides]
    variables = {} if literal else _plain_variables(tree)
    changed = {keys[0]: value for keys, value in settings if len(keys) == 1 and keys[0] in variables}
    config = _read_literals(path, tree) if literal else _evaluate(path, tree, variables, changed)
    for name in variables:
        config.pop(name, None)
    _complete(config, scope)
    for keys, value in settings:
        if keys[0] not in changed:
            _set(config, keys, value, variables)
    _check(config)
    return config


def write_config(config: dict[str, Any], path: Path, about: str) -> None:
    """Write a resolved recipe as Python assignments of literals, which `load_recipe` reads back to the same dict."""
    body = "\n".join(f"{key} = {pprint.pformat(config[key], width=110, sort_dicts=False)}" for key in sorted(config))
    path.write_text(f'"""{about}"""\n\n{body}\n', encoding="utf-8")


def _first_line(source: str) -> str:
    try:
        text = ast.get_docstring(ast.parse(source)) or ""
    except SyntaxError:
        return "(cannot be parsed)"
    return text.split("\n", 1)[0]


def _plain_variables(tree: ast.Module) -> dict[str, ast.Assign]:
    """Module-level ``name = literal`` statements that are not settings of the Runner."""
    return {
        node.targets[0].id: node
        for node in tree.body
        if isinstance(node, ast.Assign)
        and len(node.targets) == 1
        and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id not in _KEYS
    }


def _read_literals(path: Path, tree: ast.Module) -> dict[str, Any]:
    config = {}
    for node in tree.body:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # the docstring
        try:
            if not isinstance(node, ast.Assign) or not isinstance(node.targets[0], ast.Name):
                raise ValueError("only assignments are allowed")
            config[node.targets[0].id] = ast.literal_eval(node.value)
        except ValueError as error:
            raise ConfigError(f"recipe: {path}, line {node.lineno}: {error}") from None
    return config


def _evaluate(
    path: Path, tree: ast.Module, variables: dict[str, ast.Assign], changed: dict[str, Any]
) -> dict[str, Any]:
    try:
        if not changed:
            return _plain(Config.fromfile(path, lazy_import=True).to_dict())
        for name, value in changed.items():
            variables[name].value = ast.parse(repr(value), mode="eval").body
        with tempfile.TemporaryDirectory() as folder:
            # Beside a copy of its siblings, so that `with read_base(): from .base import *` still finds them.
            for sibling in path.parent.glob("*.py"):
                (Path(folder) / sibling.name).write_bytes(sibling.read_bytes())
            copy = Path(folder) / path.name
            copy.write_text(ast.unparse(ast.fix_missing_locations(tree)), encoding="utf-8")
            return _plain(Config.fromfile(copy, lazy_import=True).to_dict())
    except (ConfigParsingError, NameError, TypeError, AttributeError, KeyError, ImportError) as error:
        raise ConfigError(f"recipe: {path}: {type(error).__name__}: {error}") from None


def _plain(value: Any) -> Any:
    """mmengine's dict and list subclasses as the builtin ones."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_plain(item) for item in value])
    return value


def _complete(config: dict[str, Any], scope: str) -> None:
    """Fill in what recipes may leave out."""
    for key in ("model", "train_dataloader", "optim_wrapper", "train_cfg"):
        if key not in config:
            raise ConfigError(f"recipe: the setting {key!r} is missing")
    config["train_dataloader"].setdefault("shuffle", "sampler" not in config["train_dataloader"])
    if "test_dataloader" in config and "test_evaluator" not in config and "val_evaluator" in config:
        config["test_evaluator"] = _plain(config["val_evaluator"])
    for split in ("val", "test"):
        if f"{split}_dataloader" in config:
            config.setdefault(f"{split}_cfg", {})
            if f"{split}_evaluator" not in config:
                raise ConfigError(f"recipe: {split}_dataloader needs a {split}_evaluator, such as dict(type=Accuracy)")
    train = config["train_cfg"]
    train.setdefault("by_epoch", "max_epochs" in train)
    config.setdefault("default_hooks", {})
    for name, hook in _DEFAULT_HOOKS.items():
        given = config["default_hooks"].get(name, {})
        config["default_hooks"][name] = None if given is None else {**hook, **given}
    config.setdefault("randomness", {}).setdefault("seed", 0)
    config.setdefault("default_scope", scope)
    config.setdefault("strategy", {"type": "ddp"})
    config.setdefault("device", "auto")
    config.setdefault("env_cfg", {})
    if "optimizer" in config["optim_wrapper"] and "type" not in config["optim_wrapper"]:
        config["optim_wrapper"].setdefault("amp", False)


def _parse(override: str) -> tuple[list[str], Any]:
    name, equals, text = override.partition("=")
    keys = name.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"--set: expected key=value such as optim_wrapper.optimizer.lr=3e-4, got {override!r}")
    text = text.strip()
    words = {"true": True, "false": False, "none": None, "null": None}
    if text.lower() in words:
        return keys, words[text.lower()]
    try:
        return keys, ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return keys, text


def _set(config: dict[str, Any], keys: list[str], value: Any, variables: Iterable[str]) -> None:
    """Change one setting; groups on the way to it are made if they are missing, and checked afterwards."""
    name = ".".join(keys)
    node: Any = config
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(node, list):
            if not re.fullmatch(r"-?\d+", key) or not -len(node) <= int(key) < len(node):
                raise ConfigError(f"--set {name}: {'.'.join(keys[:depth])} is a list of {len(node)}, got index {key!r}")
            place: Any = int(key)
        elif isinstance(node, dict):
            place = key
            if depth == 0 and key not in _KEYS:
                raise ConfigError(f"--set {name}: unknown setting {key!r}{did_you_mean(key, [*_KEYS, *variables])}")
        else:
            raise ConfigError(f"--set {name}: {'.'.join(keys[:depth])} is {node!r}, it has no parts")
        if last:
            old = node[place] if isinstance(node, list) else node.get(place)
            node[place] = _compatible(name, old, value)
        elif isinstance(node, dict) and node.get(place) is None:
            node[place] = {}
        if not last:
            node = node[place]


def _compatible(name: str, old: Any, new: Any) -> Any:
    """``new``, if it can stand where ``old`` stood."""
    if old is None or new is None:
        return new
    if isinstance(old, dict) and not isinstance(new, dict):
        raise ConfigError(f"--set {name}: this is a group with the settings {', '.join(old)}; set one of them")
    if isinstance(old, bool) and not isinstance(new, bool):
        raise ConfigError(f"--set {name}: expected true or false, got {new!r}")
    if isinstance(old, int | float) and not isinstance(old, bool) and isinstance(new, str):
        raise ConfigError(f"--set {name}: expected a number such as {old}, got {new!r}")
    return new


def _check(config: dict[str, Any]) -> None:
    for key in config:
        if key not in _KEYS:
            raise ConfigError(f"recipe: unknown setting {key!r}{did_you_mean(key, _KEYS)}")
    for key, value in config.items():
        if key != "visualizer":
            _check_group(value, key)


def _check_group(value: Any, path: str) -> None:
    """Compare the keys of every dict with the arguments of what it builds."""
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_group(item, f"{path}.{index}")
        return
    if not isinstance(value, dict):
        return
    known = _known_keys(value, path)
    for key, item in value.items():
        if known is not None and key not in known:
            what = f" of {value['type']}" if isinstance(value.get("type"), str) else ""
            raise ConfigError(f"{path}.{key}: unknown setting {key!r}{what}{did_you_mean(str(key), known)}")
        _check_group(item, f"{path}.{key}")


def _known_keys(value: dict[str, Any], path: str) -> set[str] | None:
    """Keys that a dict may have; None if that is not known."""
    end = path.rsplit(".", 1)[-1]
    group = _GROUPS.get(end)
    kind = value.get("type")
    if not isinstance(kind, str) or "." not in kind:
        return group  # a registered name is checked when it is built
    accepted = accepted_arguments(resolve(kind))
    if accepted is None:
        return None
    if path.startswith("param_scheduler"):
        accepted = accepted | {"convert_to_iter_based"}
    if path.startswith(("default_hooks", "custom_hooks")):
        accepted = accepted | {"priority"}
    return accepted | (group or set()) | _ADDED_BY_REGISTRIES
