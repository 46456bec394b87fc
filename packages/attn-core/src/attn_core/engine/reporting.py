"""What a run tells: ``metrics.jsonl`` and the metric writers, and the progress display."""

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from mmengine.hooks import Hook
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from attn_core.engine.distributed import mean_over_processes


class MetricsHook(Hook):
    """Append to ``metrics.jsonl``: means of the losses every few steps, every validation and test.

    A line is ``{"split": "train", "step": 40, "epoch": 2, "loss": ..., "lr": ..., "seconds": ...}``; ``seconds`` is
    wall time since the previous line. A resumed run cuts off the lines after its checkpoint, so that the file
    is the one of an uninterrupted run (``seconds`` apart). TensorBoard and W&B get the same numbers.

    Args:
        every_steps: Steps between two lines of the training split.
    """

    priority = "BELOW_NORMAL"

    def __init__(self, every_steps: int = 10) -> None:
        self.every_steps = every_steps
        self._sums: dict[str, float] = {}
        self._count = 0
        self._path: Path | None = None
        self._file: TextIO | None = None
        self._since = time.perf_counter()
        self._cut: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """Sums since the last line, and the length of the file."""
        if self._file is not None:
            os.fsync(self._file.fileno())
        length = self._path.stat().st_size if self._path is not None else 0
        return {"sums": dict(self._sums), "count": self._count, "bytes": length}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the sums; the file is cut when training begins."""
        self._sums, self._count, self._cut = dict(state["sums"]), state["count"], state["bytes"]

    def before_train(self, runner: Any) -> None:
        """Open the file at the resumed position; a run from the start begins a new file."""
        self._since = time.perf_counter()
        if runner.rank == 0:
            path = self._path = runner.directory / "metrics.jsonl"
            path.touch()
            os.truncate(path, min(self._cut or 0, path.stat().st_size))

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:  # noqa: ARG002  mmengine's hook
        """Add up; write a line if it is time."""
        for name, value in (outputs or {}).items():
            self._sums[name] = self._sums.get(name, 0.0) + value.detach().item()
        self._count += 1
        step = runner.iter + 1
        if step % self.every_steps and step != runner.max_iters:
            return
        values = mean_over_processes({name: total / self._count for name, total in self._sums.items()}, runner.device)
        values |= {name: rates[0] for name, rates in runner.optim_wrapper.get_lr().items()}
        if "train/grad_norm" in runner.message_hub.log_scalars:
            values["grad_norm"] = runner.message_hub.get_scalar("train/grad_norm").current()
        self._sums, self._count = {}, 0
        self._write(runner, "train", step, runner.epoch + 1, values)

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Write the validation metrics."""
        if runner.is_training:
            self._write(runner, "val", runner.iter, max(runner.epoch, 1), metrics or {})

    def after_run(self, runner: Any) -> None:  # noqa: ARG002  mmengine's hook
        """Close the file."""
        self.close()

    def close(self) -> None:
        """Close the file; it is opened again when needed."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, runner: Any, split: str, step: int, epoch: int, values: dict[str, Any]) -> None:
        seconds, self._since = time.perf_counter() - self._since, time.perf_counter()
        if runner.rank != 0:
            return
        numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
        line = {"split": split, "step": step, "epoch": epoch}
        line |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        line |= {"seconds": round(seconds, 4)}
        if self._file is None:
            self._file = open(runner.directory / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        runner.visualizer.add_scalars({f"{split}/{name}": value for name, value in numbers.items()}, step=step)


class ProgressHook(Hook):
    """A progress bar on a terminal; elsewhere a plain line every few seconds and after every validation.

    Args:
        every_seconds: Time between two plain lines of training progress.
    """

    priority = "LOW"

    def __init__(self, every_seconds: float = 10.0) -> None:
        self.every_seconds = every_seconds
        self.console = Console(file=sys.stdout, highlight=False)
        self._bar: Progress | None = None
        self._task: Any = None
        self._last = time.perf_counter()
        self._shown = ""

    def before_train(self, runner: Any) -> None:
        """Show the bar."""
        self._last = time.perf_counter()
        if runner.rank == 0 and self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
            )
            self._task = self._bar.add_task("train", total=runner.max_iters, completed=runner.iter, numbers=self._shown)
            self._bar.start()

    def after_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:  # noqa: ARG002  mmengine's hook
        """Advance."""
        if runner.rank != 0:
            return
        numbers = f"loss {runner.message_hub.get_scalar('train/loss').current():.4f}"
        if self._bar is not None:
            self._bar.update(
                self._task,
                description=_position(runner),
                completed=runner.iter + 1,
                numbers=f"{numbers}  {self._shown}",
            )
        elif time.perf_counter() - self._last >= self.every_seconds:
            self._last = time.perf_counter()
            self._line(f"{_position(runner)}  step {runner.iter + 1}/{runner.max_iters}  {numbers}")

    def after_val_epoch(self, runner: Any, metrics: dict[str, float] | None = None) -> None:
        """Show the validation metrics."""
        if not runner.is_training or runner.rank != 0:
            return
        self._shown = "  ".join(f"val {name} {format_number(name, value)}" for name, value in (metrics or {}).items())
        if self._bar is None:
            self._last = time.perf_counter()
            done = f"epoch {runner.epoch}/{runner.max_epochs}  " if runner.max_epochs > 1 or runner.epoch else ""
            self._line(f"{done}step {runner.iter}/{runner.max_iters}  {self._shown}")

    def after_train(self, runner: Any) -> None:  # noqa: ARG002  mmengine's hook
        """Remove the bar."""
        self.close()

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, soft_wrap=True)
        sys.stdout.flush()


def format_number(name: str, value: Any) -> str:
    """A metric as people read it: shares named accuracy in percent, other numbers with four digits."""
    if not isinstance(value, int | float):
        return str(value)
    return f"{100 * value:.2f} %" if "accuracy" in name else f"{value:.4g}"


def _position(runner: Any) -> str:
    return f"epoch {runner.epoch + 1}/{runner.max_epochs}" if runner.max_epochs > 1 else "train"
