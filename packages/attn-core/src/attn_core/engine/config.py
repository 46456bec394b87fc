"""The complete recipe of a run: settings with defaults, overridden, checked, and written next to the results."""

import ast
import copy
import pprint
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from mmengine import registry as registries
from mmengine.registry import Registry

from attn_core.catalog import did_you_mean
from attn_core.engine.errors import ConfigError, UnknownSettingError
from attn_core.engine.kinds import Built, described, fits
from attn_core.engine.names import accepted_arguments, dotted_name, qualify, resolve
from attn_core.engine.recipes import SETTINGS, Recipe, find_recipe, read_literals, read_recipe, recipe_names

__all__ = ["find_recipe", "format_config", "load_recipe", "read_recipe", "recipe_names", "write_config"]

RECIPE_COPY = "recipe.py"  # beside a run's config.py: what its plain variables mean
_VARIABLES = "variables"  # key of config.py
_LOADERS = ("train_dataloader", "val_dataloader", "test_dataloader")

_LOADER: dict[str, Any] = {
    "dataset": Built,
    **dict.fromkeys(("sampler", "batch_sampler", "collate_fn", "worker_init_fn"), Built | str | None),
    **dict.fromkeys(("batch_size", "num_workers"), int),
    **dict.fromkeys(("shuffle", "drop_last", "pin_memory", "persistent_workers"), bool),
    "prefetch_factor": int | None,
    "timeout": float,
    "multiprocessing_context": str | None,
}
# What stands in dicts without a "type", by the end of their path.
_GROUPS: dict[str, dict[str, Any]] = {
    **dict.fromkeys(_LOADERS, _LOADER),
    "train_cfg": {
        "by_epoch": bool,
        **dict.fromkeys(("max_epochs", "max_iters"), int | None),
        **dict.fromkeys(("val_begin", "val_interval"), int),
        "dynamic_intervals": list[tuple[int, int]] | None,
    },
    "val_cfg": {"fp16": bool},
    "test_cfg": {"fp16": bool},
    "optim_wrapper": {
        "optimizer": Built,
        "amp": bool,
        "accumulative_counts": int,
        "clip_grad": dict | None,
        "constructor": Any,
        "paramwise_cfg": dict | None,
    },
    "clip_grad": {
        **dict.fromkeys(("max_norm", "norm_type", "clip_value"), float),
        **dict.fromkeys(("error_if_nonfinite", "foreach"), bool | None),
        "type": Literal["norm", "value"],
    },
    "paramwise_cfg": {
        "custom_keys": dict[str, dict[str, float]],
        **dict.fromkeys(("norm_decay_mult", "bias_lr_mult", "bias_decay_mult", "dwconv_decay_mult"), float | None),
        **dict.fromkeys(("flat_decay_mult", "dcn_offset_lr_mult", "decay_rate"), float | None),
        "bypass_duplicate": bool,
        "num_layers": int,
    },
    "randomness": {"seed": int | None, "deterministic": bool},
    "strategy": {"type": str, "units": list[str]},
    "env_cfg": {"cudnn_benchmark": bool},
}
# Of whole settings.
_KINDS: dict[str, Any] = {
    "model": Built,
    **dict.fromkeys((*_LOADERS, "optim_wrapper", "train_cfg", "val_cfg", "test_cfg"), dict),
    **dict.fromkeys(("randomness", "strategy", "env_cfg"), dict),
    "device": str,
    **dict.fromkeys(("load_from", "launcher", "experiment_name"), str | None),
    "log_level": str | int,
    "data_preprocessor": Built | None,
    **dict.fromkeys(("val_evaluator", "test_evaluator", "param_scheduler"), Built | list[Built] | None),
    "custom_hooks": list[Built] | None,
    "default_hooks": dict[str, Built | None],
    "compile": bool | dict | None,
    **dict.fromkeys(("sync_bn", "find_unused_parameters"), bool | None),
    "activation_checkpointing": str | list[str] | None,
}
_ADDED_BY_REGISTRIES: dict[str, Any] = {"type": str, "_scope_": str | None}
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


_DICTS = {
    *(
        "model",
        "optim_wrapper",
        "train_cfg",
        "val_cfg",
        "test_cfg",
        "default_hooks",
        "randomness",
        "strategy",
        "env_cfg",
    ),
    *(_VARIABLES, *_LOADERS),
}
_NAMES = {"device", "load_from", "log_level", "launcher", "experiment_name"}
# Whole numbers, by the end of their path: the least that makes sense.
_LEAST = {
    **dict.fromkeys(("max_epochs", "max_iters", "val_interval", "batch_size", "accumulative_counts"), 1),
    **dict.fromkeys(("num_workers", "seed", "val_begin"), 0),
}


def load_recipe(path: Path, overrides: Sequence[str] = (), *, scope: str = "", literal: bool = False) -> dict[str, Any]:
    """Read a recipe, or the resolved ``config.py`` of a run, and complete, override and check it.

    Args:
        path: The file.
        literal: Accept only assignments of literals, as in the ``config.py`` of a run; nothing is executed, unless a
            plain variable is set: then the copy of the recipe beside it says what depends on it.
        overrides: ``"a.b=c"`` settings; c is a Python literal, or else a string. A plain variable of the recipe file
            (``epochs = 40``) can be set as well, and changes everything that is computed from it.
        scope: Import name of the package, where types without dots are looked up.

    Returns:
        The recipe as nested dicts, lists and literals; types are dotted names. ``variables`` are the plain ones.

    Raises:
        ConfigError: if the file or an override is wrong.
    """
    settings = [_parse(override) for override in overrides]
    recipe, kept, config = None, path.with_name(RECIPE_COPY), {}
    if literal:
        config = read_literals(path)
        _check_kinds(config)
        variables = config.get(_VARIABLES, {})
        asked = any(len(keys) == 1 and keys[0] not in SETTINGS for keys, _ in settings)
        settable = read_recipe(kept).settable if asked and kept.is_file() else frozenset(variables)
    else:
        recipe = read_recipe(path)
        variables, settable = recipe.variables, recipe.settable
    changed = {
        keys[0]: _compatible(keys[0], variables.get(keys[0]), value)
        for keys, value in settings
        if len(keys) == 1 and keys[0] in settable
    }
    if recipe is not None:
        config = recipe.run(changed)
        config[_VARIABLES] = {**variables, **changed}
    elif changed:
        _change_variables(config, changed, kept)
    _complete(config)
    for keys, value in settings:
        if keys[0] not in changed:
            _set(config, keys, value, settable, scope)
    _check(config, scope)
    return config


def _change_variables(config: dict[str, Any], changed: Mapping[str, Any], kept: Path) -> None:
    """Change in a run's config what the recipe computes from some variables, and nothing else."""
    if not kept.is_file():
        raise ConfigError(f"--set {next(iter(changed))}: {kept} is missing; set what depends on it by its dotted name")
    recipe: Recipe = read_recipe(kept)
    before = recipe.run(config.get(_VARIABLES, {}))
    config[_VARIABLES] = {**config.get(_VARIABLES, {}), **changed}
    _carry_over(config, before, recipe.run(config[_VARIABLES]))


def _carry_over(target: dict[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Bring the differences between two dicts into a third."""
    for key in before.keys() - after.keys():
        target.pop(key, None)
    for key, new in after.items():
        old, own = before.get(key), target.get(key)
        if key in before and old == new:
            continue
        if isinstance(new, dict) and isinstance(old, dict) and isinstance(own, dict):
            _carry_over(own, old, new)
        elif (
            isinstance(new, list)
            and isinstance(old, list)
            and isinstance(own, list)
            and len(new) == len(own) == len(old)
        ):
            wrapped: dict[Any, Any] = dict(enumerate(own))
            _carry_over(wrapped, dict(enumerate(old)), dict(enumerate(new)))  # type: ignore[arg-type]
            target[key] = list(wrapped.values())
        else:
            target[key] = new


def write_config(config: dict[str, Any], path: Path, about: str) -> None:
    """Write a resolved recipe as Python assignments of literals, which `load_recipe` reads back to the same dict."""
    path.write_text(f'"""{about}"""\n\n{format_config(config)}\n', encoding="utf-8")


def format_config(config: Mapping[str, Any]) -> str:
    """Assignments of literals, one setting after the other."""
    return "\n".join(f"{key} = {pprint.pformat(config[key], width=110, sort_dicts=False)}" for key in sorted(config))


def _check_kinds(config: Mapping[str, Any]) -> None:
    """Refuse groups that are no groups, and names that are no names."""
    for key, value in config.items():
        if value is None:
            continue
        if key in _DICTS and not isinstance(value, dict):
            raise ConfigError(f"recipe: {key} is {value!r}, expected a group of settings: dict(...)")
        if key in _NAMES and not isinstance(value, str):
            raise ConfigError(f"recipe: {key} is {value!r}, expected a name")


def _complete(config: dict[str, Any]) -> None:
    """Fill in what recipes may leave out."""
    _check_kinds(config)
    for key in ("model", "train_dataloader", "optim_wrapper", "train_cfg"):
        if key not in config:
            raise ConfigError(f"recipe: the setting {key!r} is missing")
    config["train_dataloader"].setdefault("shuffle", "sampler" not in config["train_dataloader"])
    if "test_dataloader" in config and "test_evaluator" not in config and "val_evaluator" in config:
        config["test_evaluator"] = copy.deepcopy(config["val_evaluator"])
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
    config.pop("default_scope", None)  # of runs older than dotted names everywhere
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


def _no_setting(keys: list[str], config: dict[str, Any], variables: Iterable[str]) -> str:
    """What is wrong with a name whose first part is no setting; a group that stands in a setting is named there."""
    for setting, group in config.items():
        if isinstance(group, dict) and isinstance(group.get(keys[0]), dict):
            return f"{keys[0]!r} is part of a setting; did you mean '{'.'.join([setting, *keys])}'?"
    counted = {"epochs": "steps", "steps": "epochs"}.get(keys[0], "")
    if counted in variables:
        return f"unknown setting {keys[0]!r}: the length of this recipe is given in {counted}, --set {counted}=…"
    return f"unknown setting {keys[0]!r}{did_you_mean(keys[0], [*SETTINGS, *variables])}"


def _set(config: dict[str, Any], keys: list[str], value: Any, variables: Iterable[str], scope: str) -> None:
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
            if depth == 0 and key not in SETTINGS:
                raise UnknownSettingError(name, _no_setting(keys, config, variables))
        else:
            raise ConfigError(f"--set {name}: {'.'.join(keys[:depth])} is {node!r}, it has no parts")
        if last:
            old = node[place] if isinstance(node, list) else node.get(place)
            if key == "type" and isinstance(value, str) and "." not in value:
                value = _qualified(value, old, name, scope)
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
    if isinstance(old, list | tuple) and not isinstance(new, list | tuple):
        raise ConfigError(f"--set {name}: expected a list such as [a, b], got {new!r}")
    if isinstance(old, bool) and not isinstance(new, bool):
        raise ConfigError(f"--set {name}: expected true or false, got {new!r}")
    if isinstance(old, int | float) and not isinstance(old, bool) and isinstance(new, str):
        raise ConfigError(f"--set {name}: expected a number such as {old}, got {new!r}")
    return new


def _check(config: dict[str, Any], scope: str) -> None:
    _check_kinds(config)
    for key in config:
        if key not in SETTINGS and key != _VARIABLES:
            raise ConfigError(f"recipe: unknown setting {key!r}{did_you_mean(key, SETTINGS)}")
    for key in sorted(config, key=lambda key: key not in ("train_cfg", *_LOADERS)):  # what others are computed from
        value = config[key]
        if key not in ("visualizer", _VARIABLES):
            _check_kind(value, _KINDS.get(key, Any), key)
            _check_group(value, key, scope)


def _check_group(value: Any, path: str, scope: str) -> None:
    """Compare the keys of every dict with the arguments of what it builds; write out types without dots."""
    if isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_group(item, f"{path}.{index}", scope)
        return
    if not isinstance(value, dict):
        return
    if isinstance(value.get("type"), str) and "." not in value["type"] and _is_built(path):
        value["type"] = _qualified(value["type"], None, f"{path}.type", scope)
    known = _known_keys(value, path)
    for key, item in value.items():
        if known is not None and key not in known:
            what = f" of {value['type']}" if isinstance(value.get("type"), str) else ""
            raise ConfigError(f"{path}.{key}: unknown setting {key!r}{what}{did_you_mean(str(key), known)}")
        least = _LEAST.get(key)
        if least is not None and known is not None and (type(item) is not int or item < least) and item is not None:
            raise ConfigError(f"{path}.{key}: expected a whole number of at least {least}, got {item!r}")
        _check_kind(item, (known or {}).get(key, Any), f"{path}.{key}")
        _check_group(item, f"{path}.{key}", scope)


def _check_kind(value: Any, kind: Any, where: str) -> None:
    """Refuse a value of another kind than it is annotated with, and a ``type`` that is no name."""
    if isinstance(value, dict) and not isinstance(value.get("type", ""), str):
        raise ConfigError(f"{where}.type: expected the name of a class, got {value['type']!r}")
    if not fits(value, kind):
        raise ConfigError(f"{where}: expected {described(kind)}, got {value!r}")


def _is_built(path: str) -> bool:
    """Whether the type of this dict names a class; that of ``strategy`` and ``clip_grad`` is a word."""
    return path.rsplit(".", 1)[-1] not in ("strategy", "clip_grad")


def _qualified(name: str, old: Any, where: str, scope: str) -> str:
    """The dotted name of a type given without dots."""
    if not _is_built(where.rpartition(".")[0]):
        return name
    for registry in (value for value in vars(registries).values() if isinstance(value, Registry)):
        registry.import_from_location()
        if old is None and name in registry.module_dict:
            return dotted_name(registry.module_dict[name])
    beside = old if isinstance(old, str) and "." in old else None
    return qualify(name, beside=beside, places=["attn_core.engine", *([scope] if scope else [])], where=where)


def _known_keys(value: dict[str, Any], path: str) -> dict[str, Any] | None:
    """Keys that a dict may have, and what may stand there; None if that is not known."""
    end = path.rsplit(".", 1)[-1]
    group = _GROUPS.get(end)
    kind = value.get("type")
    if not isinstance(kind, str) or "." not in kind:
        return group
    accepted = accepted_arguments(resolve(kind))
    if accepted is None:
        return None
    if path.startswith("param_scheduler"):
        accepted = accepted | {"convert_to_iter_based": bool}
    if path.startswith(("default_hooks", "custom_hooks")):
        accepted = accepted | {"priority": int | str}
    return (group or {}) | accepted | _ADDED_BY_REGISTRIES
