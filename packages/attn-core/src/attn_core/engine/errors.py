"""What can go wrong in a run, said in one line: the command line prints these without a traceback."""

import signal


class EngineError(Exception):
    """A run cannot go on, for a reason that the user can act on."""

    exit_code = 1


class ConfigError(EngineError, ValueError):
    """A recipe, an override or an option is wrong."""

    exit_code = 2


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
