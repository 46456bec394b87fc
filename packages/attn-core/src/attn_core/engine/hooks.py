"""When checkpoints are written, and what signals do."""

import logging
import math
import signal
from types import FrameType
from typing import Any

from mmengine.hooks import Hook

from attn_core.catalog import did_you_mean
from attn_core.engine.checkpoint import list_checkpoints, remove_checkpoint
from attn_core.engine.distributed import any_process
from attn_core.engine.errors import ConfigError, RunInterrupted
from attn_core.engine.loops import EpochLoop, StepLoop
from attn_core.engine.runner import Runner

logger = logging.getLogger(__name__)


class CheckpointHook(Hook):
    """Write checkpoints to resume from, and the best weights by a validation metric.

    The last step is always written. In training counted in epochs a checkpoint comes before the epoch's validation,
    which a resumed run does again, with the same result; counted in steps it comes after the validation of its step.

    Args:
        every_epochs: Write at the end of every so many epochs; only in training counted in epochs.
        every_steps: Write every so many steps; in training counted in steps the default is the validation interval.
        keep: How many of the newest stay.
        best: Name of the validation metric that selects the best weights; None selects none.
        rule: Whether a greater or a smaller value is better.
    """

    priority = "VERY_LOW"

    def __init__(
        self,
        every_epochs: int | None = 1,
        every_steps: int | None = None,
        *,
        keep: int = 2,
        best: str | None = None,
        rule: str = "greater",
    ) -> None:
        if rule not in ("greater", "less"):
            raise ConfigError(f"checkpoint: rule must be 'greater' or 'less', got {rule!r}")
        if keep < 1:
            raise ConfigError(f"checkpoint: keep must be at least 1, got {keep}")
        self.every_epochs = every_epochs
        self.every_steps = every_steps
        self.keep = keep
        self.best = best
        self.rule = rule
        self.best_value: float | None = None
        self.best_step: int | None = None
        self.written_step: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """The best value so far."""
        return {"best_value": self.best_value, "best_step": self.best_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up the best value of the resumed run."""
        self.best_value = state.get("best_value")
        self.best_step = state.get("best_step")

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:  # noqa: ARG002  mmengine's hook
        """Write if it is time."""
        step = runner.iter + 1
        if self._due(runner, step) and not _validates_before_next_step(runner, step):
            self.write(runner, step, runner.epoch)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Keep the weights if they are the best so far; write the checkpoint that waited for this validation."""
        if not runner.is_training or metrics is None:
            return
        self._select(runner, metrics)
        if isinstance(runner.train_loop, StepLoop) and self._due(runner, runner.iter):
            self.write(runner, runner.iter, runner.epoch)

    def _select(self, runner: Runner, metrics: dict[str, float]) -> None:
        if self.best is None:
            return
        if self.best not in metrics:
            raise ConfigError(f"checkpoint: no validation metric {self.best!r}{did_you_mean(self.best, metrics)}")
        value = float(metrics[self.best])
        if not math.isfinite(value) or not self._better(value):
            return
        self.best_value, self.best_step = value, runner.iter
        written = runner.write_best(runner.iter, runner.epoch, {k: float(v) for k, v in metrics.items()})
        if written is not None:
            for name in list_checkpoints(runner.directory, best=True):
                if name != written.name:
                    remove_checkpoint(runner.directory, name)

    def write(self, runner: Runner, step: int, epoch: int) -> None:
        """Write a checkpoint now, and remove the oldest ones."""
        written = runner.write_state(step, epoch)
        self.written_step = step
        if written is not None:
            older = [name for name in list_checkpoints(runner.directory) if name != written.name]
            for name in older[self.keep - 1 :]:
                remove_checkpoint(runner.directory, name)

    def _due(self, runner: Runner, step: int) -> bool:
        if step == runner.max_iters:
            return True
        if isinstance(runner.train_loop, EpochLoop):
            batches = len(runner.train_dataloader)
            if self.every_epochs and step % batches == 0 and (step // batches) % self.every_epochs == 0:
                return True
            return bool(self.every_steps) and step % self.every_steps == 0
        return step % (self.every_steps or runner.val_interval) == 0

    def _better(self, value: float) -> bool:
        if self.best_value is None:
            return True
        return value > self.best_value if self.rule == "greater" else value < self.best_value


class SignalHook(Hook):
    """SIGTERM and SIGINT: finish the step (or the validation), write a checkpoint, stop with exit code 143 or 130.

    A second signal stops at once, without a checkpoint.
    """

    priority = "LOWEST"

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def before_train(self, runner: Any) -> None:  # noqa: ARG002  mmengine's hook
        """Listen."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            try:
                self._previous[signum] = signal.signal(signum, self._receive)
            except ValueError:  # not the main thread: whoever owns it handles signals
                return

    def after_train(self, runner: Any) -> None:  # noqa: ARG002  mmengine's hook
        """Stop listening."""
        self.restore()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:  # noqa: ARG002  mmengine's hook
        """Stop after this step if a signal came, to any process."""
        if not _validates_before_next_step(runner, runner.iter + 1):
            self._stop_if_asked(runner, runner.iter + 1, runner.epoch)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:  # noqa: ARG002  mmengine's hook
        """Stop after a validation in training if a signal came during it."""
        if runner.is_training:
            self._stop_if_asked(runner, runner.iter, runner.epoch)

    def restore(self) -> None:
        """Put the previous signal handlers back."""
        while self._previous:
            signum, handler = self._previous.popitem()
            signal.signal(signum, handler)

    def _receive(self, signum: int, _frame: FrameType | None) -> None:
        if self.received is not None:
            self.restore()
            raise RunInterrupted(signum, f"{signal.Signals(signum).name} came twice: stopped without a checkpoint")
        self.received = signum

    def _stop_if_asked(self, runner: Runner, step: int, epoch: int) -> None:
        if not any_process(self.received is not None, runner.device):
            return
        hook = next(hook for hook in runner.hooks if isinstance(hook, CheckpointHook))
        if hook.written_step != step or epoch * len(runner.train_dataloader) == step:
            hook.write(runner, step, epoch)
        self.restore()
        signum = self.received or signal.SIGTERM
        raise RunInterrupted(
            signum,
            f"{signal.Signals(signum).name}: stopped after step {step}; saved {runner.directory / f'step_{step}'}; "
            "continue with --resume",
        )


def _validates_before_next_step(runner: Runner, step: int) -> bool:
    """In training counted in steps: whether the validation of this step is still to come."""
    loop = runner.train_loop
    if not isinstance(loop, StepLoop) or runner.val_loop is None or step < loop.val_begin:
        return False
    return step % loop.val_interval == 0 or step == loop.max_iters
