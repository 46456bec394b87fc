"""Entry point of the processes that the tests start, kill and compare."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from attn_core.engine.cli import run_cli
from tiny_task import CLI, Net


def run(arguments: Sequence[str], folder: Path, environment: dict[str, str], output: Path) -> None:
    """Run the command line in a folder, with its output in a file."""
    os.chdir(folder)
    os.environ.update(environment)
    with open(output, "wb") as file:
        for stream, number in ((sys.stdout, 1), (sys.stderr, 2)):
            stream.flush()
            os.dup2(file.fileno(), number)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    torch.set_num_threads(1)
    # Inherited "forkserver" otherwise: loader workers would import torch anew, and outlive a process that is killed.
    multiprocessing.set_start_method("fork", force=True)
    if "SIGNAL_AT_FORWARD" in environment:
        _signal_at_forward(*environment["SIGNAL_AT_FORWARD"].split(":"))
    if "KILL_AT_RENAME" in environment:
        _kill_at_rename(int(environment["KILL_AT_RENAME"]))
    run_cli(CLI, arguments)


def _signal_at_forward(name: str, count: str) -> None:
    """Send a signal to this process in its n-th forward pass, counting training and evaluation."""
    forward, left = Net.forward, int(count)

    def counted(self: Net, x: torch.Tensor) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.Signals[name])
        return forward(self, x)

    Net.forward = counted


def _kill_at_rename(count: int) -> None:
    """SIGKILL before the n-th rename, which is in the middle of writing a checkpoint."""
    replace, left = os.replace, count

    def counted(*paths: Path) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = counted
