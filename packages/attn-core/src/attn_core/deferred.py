"""Public names of a package that are imported when they are first used (PEP 562), so that importing it is cheap."""

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def deferred(package: str, places: Mapping[str, Iterable[str]]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a package.

    Type checkers do not follow it: the package names the same imports under ``if TYPE_CHECKING``. ::

        __getattr__, __dir__ = deferred(__name__, {"package.models.davit": ("DaViT", "DaViTDense")})

    Args:
        package: Its ``__name__``.
        places: Module → the names that it holds.
    """
    place = {name: module for module, names in places.items() for name in names}

    def look_up(name: str) -> Any:
        if name not in place:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(place[name]), name)
        setattr(sys.modules[package], name, value)  # asked once
        return value

    return look_up, lambda: sorted({*vars(sys.modules[package]), *place})
