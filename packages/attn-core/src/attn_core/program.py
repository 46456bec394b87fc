"""Which of the packages' commands this process is, if any."""

import sys
from pathlib import Path

COMMANDS = ("detection", "medical-seg", "seq-models", "vision-models", "vlm-tools")


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
