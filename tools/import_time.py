"""How much longer ``import attn_core`` and the ``--help`` of every command take than ``import torch``.

``python tools/import_time.py [--rounds 5] [--verbs]``: ratios of medians over interleaved fresh processes, of processor
time, which other programs on the machine change little, and of wall time. Exit code 1 if a ratio of processor times is
above 1.2 (``import attn_core``) or 1.3 (a ``--help``).
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from typer.main import get_command

SCRIPTS = ("detection", "medical-seg", "seq-models", "vision-models", "vlm-tools")


def seconds(command: list[str]) -> tuple[float, float]:
    """Processor time and wall time of a process."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    start, before = time.perf_counter(), os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
    wall, after = time.perf_counter() - start, os.times()
    return (after.children_user - before.children_user) + (after.children_system - before.children_system), wall


def verbs_of(script: str) -> list[str]:
    """The verbs of a command."""
    from importlib import import_module

    from attn_core.engine.cli import build_cli

    command = get_command(build_cli(import_module(f"{script.replace('-', '_')}.cli").CLI))
    return list(getattr(command, "commands", {}))


def main() -> int:
    """Print the medians and their ratio; 1 if the ratio is above the limit, else 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--verbs", action="store_true", help="the help of every verb as well")
    options = parser.parse_args()
    commands = {f"import {name}": [sys.executable, "-c", f"import {name}"] for name in ("torch", "attn_core")}
    for script in SCRIPTS:
        for verb in ["", *(verbs_of(script) if options.verbs else ())]:
            words = [script, *([verb] if verb else []), "--help"]
            commands[" ".join(words)] = [str(Path(sys.executable).with_name(script)), *words[1:]]
    for command in commands.values():  # byte code and the disk cache
        seconds(command)
    measured = [{name: seconds(command) for name, command in commands.items()} for _ in range(options.rounds)]
    times = {name: [statistics.median(row[name][kind] for row in measured) for kind in (0, 1)] for name in commands}
    processor, wall = times["import torch"]
    slow = False
    for name, (own_processor, own_wall) in times.items():
        ratio = own_processor / processor
        print(f"{name:32} {own_processor:6.2f} s, ratio {ratio:.2f}; wall {own_wall:6.2f} s, {own_wall / wall:.2f}")
        slow = slow or ratio > (1.2 if name.startswith("import") else 1.3)
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
