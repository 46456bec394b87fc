"""What training and commands need beyond torch; importing this file says which extra to install where it is missing."""

import sys
from importlib.util import find_spec
from pathlib import Path

NEEDED = ("mmengine", "matplotlib", "rich", "safetensors", "typer")
COMMANDS = ("detection", "medical-seg", "seq-models", "vision-models", "vlm-tools")


def running_command(program: str) -> str | None:
    """The package whose command this process is: ``seq-models`` or ``python -m seq_models``; None in other programs."""
    path = Path(program)
    name = (path.parent.name if path.stem == "__main__" else path.stem).replace("_", "-")
    return name if name in COMMANDS else None


def require(needed: tuple[str, ...] = NEEDED) -> None:
    """Stop where a package is missing: a command with one line, an importing program with an ImportError.

    Raises: ImportError: names what is missing and the extra that brings it.
    """
    missing = [name for name in needed if find_spec(name) is None]
    if not missing:
        return
    command = running_command(sys.argv[0] if sys.argv else "")
    package = command or "attn-core"
    text = (
        f"{package}: training and commands need {', '.join(missing)}; install the extra: pip install '{package}[train]'"
    )
    if command:
        raise SystemExit(text)
    raise ImportError(text)


require()
