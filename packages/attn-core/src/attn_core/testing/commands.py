"""Commands under random bad input: one line and a foreseen exit code, no traceback, no hang.

``BAD_INPUTS=200 pytest FILE`` draws that many for each verb, other ones each time, and with
``--hypothesis-show-statistics`` counts the exit codes. The default is a handful, always the same. Needs hypothesis.
"""

import contextlib
import io
import os
import signal
from typing import Any, NamedTuple

from hypothesis import HealthCheck, currently_in_test_context, event, settings

from attn_core.engine import TaskPackage
from attn_core.engine.cli import run_cli

SECONDS = 60
EXAMPLES = int(os.environ.get("BAD_INPUTS", "4"))
bad_inputs = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="BAD_INPUTS" not in os.environ,
    database=None,
    suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
)
"""How many are drawn: the decorator of a test with ``@given``."""


class Answer(NamedTuple):
    """What a command did.

    Attributes:
        code: Exit code.
        printed: Standard output.
        lines: Of standard error, without notes.
    """

    code: int
    printed: str
    lines: list[str]


def answer(task: TaskPackage, *arguments: str) -> Answer:
    """Run a command in this process.

    Raises:
        TimeoutError: it took more than a minute of processor time, or ten minutes.
    """

    def hang(*_: Any) -> None:
        raise TimeoutError(f"{task.package.name} {arguments} runs for more than {SECONDS} s")

    printed, errors, code = io.StringIO(), io.StringIO(), 0
    former = [(kind, signal.signal(kind, hang)) for kind in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # of the processor: a busy machine is no hang
    signal.alarm(10 * SECONDS)
    try:
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(printed):
            run_cli(task, list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for kind, handler in former:
            signal.signal(kind, handler)
    lines = [line for line in errors.getvalue().splitlines() if line.strip() and not line.startswith("note:")]
    return Answer(code, printed.getvalue(), lines)


def assert_foreseen(task: TaskPackage, *arguments: str) -> Answer:
    """Run a command; it must succeed silently, or end in one line and the exit code 1 or 2.

    70 is what an error that nobody foresaw gives.
    """
    found = answer(task, *arguments)
    if currently_in_test_context():
        event(f"{task.package.name} {arguments[0]}: exit code {found.code}")
    assert found.code in (0, 1, 2), (arguments, found.code, found.lines)
    assert len(found.lines) == (found.code != 0), (arguments, found.code, found.lines)
    assert not found.lines or found.lines[0].startswith(task.package.name), (arguments, found.lines)
    assert "Traceback" not in found.printed + "".join(found.lines), (arguments, found)
    return found
