"""Dotted names of recipes (``torch.optim.AdamW``) and what they accept."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

from attn_core.engine.errors import ConfigError
from attn_core.registry import did_you_mean


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


def accepted_arguments(builder: Callable[..., Any]) -> set[str] | None:
    """Names of the arguments of a class or function; None if anything is accepted.

    A constructor with ``**kwargs`` hands them to its base class, so the names of the bases count as well.
    """
    classes = builder.__mro__ if inspect.isclass(builder) else ()
    candidates = [vars(c)["__init__"] for c in classes if c is not object and "__init__" in vars(c)] or [builder]
    names: set[str] = set()
    for function in candidates:
        try:
            parameters = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            return None
        names |= {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names - {"self"}
    return None
