"""A tiny task package, and processes of its command line that start quickly: torch is imported once for all."""

import multiprocessing
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # tiny_task is imported by name, here and in the processes

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["attn_core.engine.cli", "torch._dynamo", "mmengine.visualization"])

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    """``command("train", "--out", "a", processes=2, SIGNAL_AT_FORWARD="SIGKILL:9")`` → exit code and output."""
    from tiny_task import process

    started = []

    def run(*arguments: str, processes: int = 1, **environment: str) -> tuple[int, str]:
        if processes > 1:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = str(probe.getsockname()[1])
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
            arguments = (*arguments, "--launcher", "pytorch")
        outputs = [tmp_path / f"output_{len(started)}_{rank}.txt" for rank in range(processes)]
        group = [
            _CONTEXT.Process(
                target=process.run,
                args=(arguments, tmp_path, {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}, outputs[rank]),
            )
            for rank in range(processes)
        ]
        started.extend(group)
        for member in group:
            member.start()
        for member in group:
            member.join(90)
        text = "".join(output.read_text() for output in outputs if output.exists())
        codes = [member.exitcode for member in group if member.exitcode is not None]
        assert len(codes) == len(group), f"still running after 90 s:\n{text}"
        return max(codes, key=abs), text

    yield run
    for member in started:
        if member.is_alive():
            member.kill()
            member.join()
