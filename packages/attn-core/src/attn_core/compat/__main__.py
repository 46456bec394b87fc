"""``python -m attn_core.compat run | doctor | list``."""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from . import REPAIRS, SHIMS, InstalledError, legacy, provide
from .doctor import diagnose


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0, that of the program that was run, or 2 for a request that cannot be met."""
    parser = argparse.ArgumentParser(prog="python -m attn_core.compat", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser(
        "run", help="run a script over shims: run --provide natten@0.14,msda script.py --its options"
    )
    run.add_argument("--provide", default="", metavar="NAMES", help="shims, joined by commas")
    run.add_argument("--legacy", default="", metavar="NAMES", help="repairs, joined by commas")
    run.add_argument("--force", action="store_true", help="put the shims before what is installed")
    run.add_argument(
        "command", nargs=argparse.REMAINDER, help="script.py ARGS, -m MODULE ARGS, or a program such as torchrun"
    )
    doctor = verbs.add_parser("doctor", help="which shims and repairs a repository needs")
    doctor.add_argument("folder", type=Path)
    verbs.add_parser("list", help="all shims and repairs")
    options = parser.parse_args(arguments)
    try:
        if options.verb == "run":
            return _run(options.provide, options.legacy, options.force, options.command)
        if options.verb == "doctor":
            print(diagnose(options.folder).text())
            return 0
    except (ValueError, InstalledError) as problem:
        print(f"attn_core.compat {options.verb}: {problem}", file=sys.stderr)
        return 2
    for title, table in (
        ("shims", {n: s.replaces for n, s in SHIMS.items()}),
        ("repairs", {n: r.restores for n, r in REPAIRS.items()}),
    ):
        print(title)
        for name, meaning in table.items():
            print(f"  {name:28} {meaning}")
    return 0


def _run(shims: str, repairs: str, force: bool, command: list[str]) -> int:
    if command[:1] == ["--"]:
        command = command[1:]
    if not command:
        raise ValueError("name a script, -m MODULE or a program after the options")
    names, fixes = ([name.strip() for name in listed.split(",") if name.strip()] for listed in (shims, repairs))
    # This process is left at once: what stays is the environment, from which the next one begins.
    if names:
        provide(*names, force=force)
    if fixes:
        legacy(*fixes)
    target = command[0]
    if target == "-m" or (Path(target).is_file() and not os.access(target, os.X_OK)) or target.endswith(".py"):
        if target != "-m" and not Path(target).is_file():
            raise ValueError(f"there is no file {target}")
        command = [sys.executable, *command]
    elif shutil.which(target) is None:
        raise ValueError(f"there is neither a file nor a program {target}")
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "nt":  # there os.exec returns to the shell at once
        return subprocess.call(command)
    os.execvp(command[0], command)
    raise AssertionError("unreachable")


if __name__ == "__main__":
    sys.exit(main())
