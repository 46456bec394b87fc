"""Options that several verbs share, and the method that ``--method`` and ``--option`` name."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attn_core.catalog import did_you_mean
from vlm_tools.models import method_of
from vlm_tools.readings.names import READINGS

if TYPE_CHECKING:
    from vlm_tools.intervention.method import Method
    from vlm_tools.models.session import Session

Model = Annotated[
    str | None,
    typer.Option(
        help="Run directory, folder, or a name on the hub (default: newest digits-world run).", metavar="MODEL"
    ),
]
MethodName = Annotated[str | None, typer.Option("--method", help="Such as pai: vlm-tools list.", metavar="NAME")]
Options = Annotated[
    list[str] | None, typer.Option("--option", metavar="KEY=VALUE", help="Option of the method (repeatable).")
]
Picture = Annotated[Path, typer.Argument(help="Picture file.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<n>.")]
OutDir = Annotated[Path, typer.Option("--out", help="Where files are written.")]
Tokens = Annotated[int, typer.Option(help="Longest answer.", min=1, max=4096)]
ReadingName = Annotated[str, typer.Option("--reading", help=f"{', '.join(READINGS)}.")]


def chosen_method(name: str | None, options: Sequence[str] | None) -> "Method | None":
    """The method of ``--method`` and ``--option``.

    Raises:
        ValueError: unknown name or option, an option without value.
    """
    if name is None:
        if options:
            raise ValueError("--option belongs to --method, which is not given")
        return None
    values: dict[str, Any] = {}
    for option in options or ():
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"--option {option} must look like KEY=VALUE")
        try:
            values[key] = json.loads(value)
        except (ValueError, RecursionError):
            raise ValueError(f"--option {option[:80]}: the value must be a number, true, false or a list") from None
    return method_of(name, **values)


def check_reading(name: str) -> None:
    """Raise ValueError for an unknown ``--reading``, before a model is opened."""
    if name not in READINGS:
        raise ValueError(f"--reading {name}: unknown reading{did_you_mean(name, READINGS)}")


def under(session: "Session", method: "Method | None") -> contextlib.AbstractContextManager[Any]:
    """The session's model under a method, or as it is."""
    from vlm_tools.intervention.hooking import intervene

    return contextlib.nullcontext() if method is None else intervene(session.model, method)
