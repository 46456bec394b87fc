"""Dotted names of recipes (``torch.optim.AdamW``), what they accept, and what they build."""

import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from typing import Any

from attn_core.catalog import did_you_mean
from attn_core.engine.errors import ConfigError, building
from attn_core.engine.kinds import argument_kinds


def resolve(name: str) -> Callable[..., Any]:
    """Import the object of a dotted name.

    Raises:
        ConfigError: if there is no such module or attribute; the message holds the nearest one.
    """
    parts = name.split(".")
    for depth in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:depth])
        try:
            found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name and module_name.startswith(error.name):
                continue
            raise ConfigError(f"recipe: {name} needs the package {error.name!r}, which is not installed") from error
        for attribute in parts[depth:]:
            if not hasattr(found, attribute):
                raise ConfigError(f"recipe: {found.__name__} has no {attribute!r}{did_you_mean(attribute, dir(found))}")
            found = getattr(found, attribute)
        return found
    raise ConfigError(f"recipe: cannot import {name!r}")


def build(recipe: Any, **defaults: Any) -> Any:
    """What a recipe's ``dict(type=..., ...)`` stands for; anything but a dict is given back as it is.

    Args:
        recipe: ``type`` is a class or function, or its dotted name; the other entries are its keyword arguments.
        **defaults: Further arguments, unless the recipe names them.

    Raises:
        ConfigError: if the dict has no ``type``, or the name leads nowhere.
    """
    if not isinstance(recipe, dict):
        return recipe
    options = {**defaults, **recipe}
    kind = options.pop("type", None)
    builder = resolve(kind) if isinstance(kind, str) else kind
    if not callable(builder):
        raise ConfigError(f"build: {recipe} needs type=..., a class or its dotted name")
    with building(getattr(builder, "__qualname__", str(builder))):
        return builder(**options)


def dotted_name(builder: Any) -> str:
    """The shortest dotted name under which a class or function can be imported: ``torch.optim.AdamW``.

    Raises:
        ConfigError: if it has none, as a lambda or a function inside a function.
    """
    module, name = getattr(builder, "__module__", None), getattr(builder, "__qualname__", None)
    if not module or not name or "<" in name or module == "__main__":
        raise ConfigError(f"recipe: {builder!r} cannot be imported by a name; move it to a module of a package")
    parts = module.split(".")
    for depth in range(1, len(parts) + 1):
        found: Any = sys.modules.get(".".join(parts[:depth]))
        for attribute in name.split("."):
            found = getattr(found, attribute, None)
        if found is builder:
            return f"{'.'.join(parts[:depth])}.{name}"
    raise ConfigError(f"recipe: {module} has no {name!r}; move it to the top level of the module")


def qualify(name: str, *, beside: str | None, places: Iterable[str], where: str) -> str:
    """The dotted name of a type that was given by its last part.

    Args:
        name: E.g. ``"SGD"``.
        beside: Dotted name of the type whose place it takes; its module, and the packages around that, come first.
        places: Modules to look in after these.
        where: The setting, for the message.

    Raises:
        ConfigError: if no place has it; the message holds the nearest name.
    """
    parts = beside.split(".")[:-1] if beside else []
    modules = [".".join(parts[:depth]) for depth in range(len(parts), 0, -1)]
    known: list[str] = []
    for place in dict.fromkeys([*modules, *places]):
        try:
            module = importlib.import_module(place)
        except ImportError:
            continue
        if callable(getattr(module, name, None)):
            return f"{place}.{name}"
        offered = getattr(module, "__all__", None) or [key for key in vars(module) if not key.startswith("_")]
        known += [key for key in offered if inspect.isclass(getattr(module, key, None))]
    example = f"; write the whole name, such as {beside}" if beside else "; write the whole name, package.module.Name"
    raise ConfigError(f"{where}: there is no {name!r}{did_you_mean(name, known) or example}")


def accepted_arguments(builder: Callable[..., Any]) -> dict[str, Any] | None:
    """The arguments of a class or function and what they may be (see `kinds`); None if anything is accepted.

    A constructor with ``**kwargs`` hands them to its base class, so the arguments of the bases count as well.
    """
    classes = builder.__mro__ if inspect.isclass(builder) else ()
    candidates = [vars(c)["__init__"] for c in classes if c is not object and "__init__" in vars(c)] or [builder]
    found: dict[str, Any] = {}
    for function in candidates:
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            return None
        kinds = argument_kinds(function)
        named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        found = {name: kinds.get(name, Any) for name in named if name != "self"} | found
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return found
    return None
