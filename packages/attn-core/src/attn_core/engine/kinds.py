"""Whether a value of a recipe can be what an argument is annotated as; only what is certainly wrong is refused."""

import inspect
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from torch import Tensor


class Built:
    """The kind of a setting that is built: ``dict(type=..., ...)``."""


_UNIONS = (Union, types.UnionType)
_LISTS = (list, tuple, set, frozenset, Sequence, Collection, Iterable)


def argument_kinds(function: Callable[..., Any]) -> dict[str, Any]:
    """What the arguments of a function may be: its annotations, else the kinds of its defaults; {} if it says nothing.

    None may stand where it is the default.
    """
    try:
        parameters = inspect.signature(function).parameters
        annotated = get_type_hints(function)
    except Exception:  # names for type checkers alone, signatures of C code: whatever they raise, nothing is said
        return {}
    kinds = {}
    for name, parameter in parameters.items():
        default = parameter.default
        if name in annotated:
            kinds[name] = Union[annotated[name], None] if default is None else annotated[name]  # noqa: UP007
        elif type(default) in (bool, int, float, str):
            kinds[name] = float if type(default) is int else type(default)
    return kinds


def fits(value: Any, kind: Any) -> bool:
    """Whether plain data (numbers, strings, None, lists, dicts) can stand for ``kind``; True where that is unknown.

    A dict with a ``type`` stands for what it builds, a string for what it may name.
    """
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return fits(value, inner[0])
    if origin in _UNIONS:
        return any(fits(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    cls = origin or kind
    if cls in (Any, object) or not isinstance(cls, type):
        return True
    if value is None:
        return cls is type(None)
    if cls in (bool, int, float, str, Path):
        return type(value) in {bool: (bool,), int: (int,), float: (int, float)}.get(cls, (str,))
    if cls is Built:
        return isinstance(value, dict) and "type" in value
    if isinstance(value, dict):
        items = value.values() if cls in (dict, Mapping) and len(inner) == 2 and "type" not in value else ()
        return all(fits(item, inner[1]) for item in items)
    if cls in _LISTS:
        if not isinstance(value, list | tuple):
            return False
        if cls is tuple and inner and inner[-1] is not Ellipsis:
            return len(value) == len(inner) and all(map(fits, value, inner))
        return not inner or all(fits(item, inner[0]) for item in value)
    if isinstance(value, str):  # the name of a class, of a data type, of an activation
        return cls not in (dict, Mapping, type(None), Tensor)
    return cls.__module__.partition(".")[0] in ("builtins", "numpy", "numbers", "jaxtyping") and cls is not type(None)


def described(kind: Any) -> str:
    """A kind in words: ``a whole number``, ``a list of numbers or none``."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return described(inner[0])
    if origin in _UNIONS:
        return " or ".join(dict.fromkeys(map(described, inner)))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    cls = origin or kind
    if cls is tuple and inner and inner[-1] is not Ellipsis:
        return f"[{', '.join(map(described, inner))}]"
    if cls in _LISTS:
        plural = {int: "whole numbers", float: "numbers", str: "words", bool: "true and false"}
        return f"a list of {plural[inner[0]]}" if inner and inner[0] in plural else "a list"
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "a word", Path: "a path"}
    words |= {dict: "dict(...)", Mapping: "dict(...)", type(None): "none", Built: "dict(type=..., ...)"}
    return words.get(cls) or f"dict(type={getattr(cls, '__name__', cls)}, ...)"
