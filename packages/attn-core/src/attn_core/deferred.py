"""What importing a package leaves for later, so that ``--help`` is quick: names (PEP 562), commands' registration."""

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

COMMANDS = ("detection", "medical-seg", "seq-models", "vision-models", "vlm-tools")


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


def running_command(program: str | None = None) -> str | None:
    """The package whose command this process is: ``seq-models`` or ``python -m seq_models``; None in other programs.

    Args:
        program: Path of the program; None: this process's.
    """
    path = Path((sys.argv[0] if sys.argv else "") if program is None else program)
    if path.stem == "__main__":
        name = path.parent.name.replace("_", "-")
    else:
        name = path.stem if path.suffix in ("", ".exe") else ""  # detection.py is a user's script
    return name if name in COMMANDS else None
