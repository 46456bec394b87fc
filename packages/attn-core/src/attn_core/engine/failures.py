"""What a command says when it fails: one line on stderr, an exit code, and a log file where nobody foresaw it."""

import difflib
import platform
import re
import sys
import tempfile
import time
import traceback
from typing import Any

import torch
import typer

from attn_core.engine.errors import BuildError, EngineError
from attn_core.engine.package import PackageId

UNEXPECTED = 70  # EX_SOFTWARE of sysexits.h
CLOSED_PIPE = 141  # as a shell reports SIGPIPE


def describe(error: BaseException, package: PackageId, verb: str) -> tuple[int, str]:
    """Exit code and line (empty: say nothing) for an exception that ended a command.

    Foreseen errors explain themselves. Anything else is named with its type, and its traceback goes to a log file
    that the line names.

    Args:
        error: What was raised.
        package: Whose command it is.
        verb: Its verb; empty before one was recognized.
    """
    if isinstance(error, typer.Exit):
        return error.exit_code, ""
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return 130, "interrupted"
    if isinstance(error, BuildError):
        return error.exit_code, f"{error}{_logged(error, package, verb)}"
    if isinstance(error, EngineError):
        return error.exit_code, str(error)
    if isinstance(error, SystemExit):  # how typer ends where the reader of its output went away
        error = error.__context__ or error
    if isinstance(error, BrokenPipeError):
        return CLOSED_PIPE, ""
    if hasattr(error, "format_message"):  # click's usage errors, which newer versions of typer carry inside themselves
        return 2, _usage(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
        place = "GPU" if isinstance(error, torch.OutOfMemoryError) else "machine"
        lower = "lower the batch size with --set train_dataloader.batch_size=..." if verb == "train" else "use less"
        return 1, f"the {place} has too little memory; {lower}"
    if isinstance(error, ModuleNotFoundError) and error.name and error.name.split(".")[0] not in _own(package):
        return 1, f"this needs the package {error.name.split('.')[0]!r}, which is not installed"
    if isinstance(error, OSError) or (isinstance(error, ValueError) and _foreseen(error, package)):
        return 1, _first_line(error)
    code = 1 if isinstance(error, ValueError) else UNEXPECTED  # of a library, about a user's file or number
    return code, f"{type(error).__name__}: {_first_line(error)}{_logged(error, package, verb)}"


def _own(package: PackageId) -> tuple[str, str]:
    return "attn_core", package.module


def _foreseen(error: Exception, package: PackageId) -> bool:
    """Whether our own code raised it, here or in a loader worker; a message of a library is not written for users."""
    if "Traceback" in str(error):
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return not frames or str(frames[-1].f_globals.get("__name__", "")).split(".")[0] in _own(package)


def _logged(error: BaseException, package: PackageId, verb: str) -> str:
    """Write the traceback; where, for the line."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    text = "".join(traceback.format_exception(error))
    versions = f"python {platform.python_version()}, torch {torch.__version__}, {platform.platform()}"
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix=f"{package.name}-{verb or 'start'}-{stamp}-", suffix=".log", delete=False, encoding="utf-8"
        ) as file:
            file.write(f"{' '.join(sys.argv)}\n{versions}\n\n{text}")
        return f"; the traceback is in {file.name}"
    except OSError:
        return ""


def _first_line(error: BaseException) -> str:
    """The message; of an error that a loader worker has sent, the last line of its traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if "Traceback" in str(error):
        return lines[-1].partition(": ")[2] or lines[-1]
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return lines[0]


def _usage(error: Any) -> str:
    text = " ".join(str(error.format_message()).split()).rstrip(".")
    text = text[:1].lower() + text[1:]
    if options := re.search(r"(\S+) \(Possible options: (.*)\)$", text):
        nearest = difflib.get_close_matches(options[1], options[2].split(", "), n=1, cutoff=0.0)
        return f"{text[: options.end(1)]}; did you mean {nearest[0]}?"
    return text.replace(". Did you mean ", "; did you mean ")
