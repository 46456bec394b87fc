"""What training and commands need beyond torch; importing this file says which extra to install where it is missing."""

from importlib.util import find_spec

from attn_core.deferred import running_command

NEEDED = ("mmengine", "matplotlib", "rich", "safetensors", "typer")


def require(needed: tuple[str, ...] = NEEDED) -> None:
    """Stop where a package is missing: a command with one line, an importing program with an ImportError.

    Raises: ImportError: names what is missing and the extra that brings it.
    """
    missing = [name for name in needed if find_spec(name) is None]
    if not missing:
        return
    command = running_command()
    package = command or "attn-core"
    text = (
        f"{package}: training and commands need {', '.join(missing)}; install the extra: pip install '{package}[train]'"
    )
    if command:
        raise SystemExit(text)
    raise ImportError(text)


require()
