"""What can go wrong in a run, said in one line: the command line prints these without a traceback."""

import contextlib
import signal
from collections.abc import Iterator


class EngineError(Exception):
    """A run cannot go on, for a reason that the user can act on."""

    exit_code = 1


class ConfigError(EngineError, ValueError):
    """A recipe, an override or an option is wrong."""

    exit_code = 2


class UnknownSettingError(ConfigError):
    """A recipe has no such setting.

    Args:
        name: The setting.
        problem: What is wrong with it.
    """

    def __init__(self, name: str, problem: str) -> None:
        super().__init__(f"--set {name}: {problem}")
        self.name = name


class BuildError(ConfigError):
    """A class does not accept its settings, and says so in its own way: the command adds a log with the traceback."""


@contextlib.contextmanager
def building(what: str) -> Iterator[None]:
    """Attribute to the recipe whatever goes wrong while something is built from it.

    What was raised for users, by this engine, about files or about memory, stays as it is.

    Args:
        what: The setting or the class, for the message.

    Raises:
        BuildError: from the exception.
    """
    try:
        yield
    except (EngineError, OSError, ImportError, ValueError, MemoryError):
        raise
    except Exception as error:  # constructors stumble over odd values in every possible way
        if "memory" in str(error).lower():
            raise
        said = (str(error).strip().splitlines() or [""])[0]
        raise BuildError(
            f"recipe: {what} cannot be built with these settings ({type(error).__name__}: {said})"
        ) from error


class CheckpointError(EngineError):
    """A checkpoint is damaged, unsafe to read, or belongs to another model."""


class NonFiniteLossError(EngineError):
    """The loss or the gradient norm became nan or infinite; no update was made with it."""


class RunInterrupted(EngineError):
    """SIGTERM or SIGINT arrived; the state was saved at the step boundary.

    Args:
        signum: The signal; the exit code is 128 + signum (143 and 130).
        message: What was saved where.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signal = signal.Signals(signum)
        self.exit_code = 128 + signum
