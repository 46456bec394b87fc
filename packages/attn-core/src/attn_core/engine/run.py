"""What is done with a run that was trained: its metrics, its model."""

from pathlib import Path
from typing import Any

from torch import nn

from attn_core.engine.checkpoint import Checkpoint, best_or_newest, load_weights, newest_intact
from attn_core.engine.config import load_recipe
from attn_core.engine.distributed import choose_device
from attn_core.engine.errors import EngineError
from attn_core.engine.hub import local_file
from attn_core.engine.names import build
from attn_core.engine.package import DrawPredictions, PackageId, TrainedRun
from attn_core.engine.results import draw_split
from attn_core.engine.run_directory import about_run, newest_run, require_run
from attn_core.engine.runner import Runner, silence_console

__all__ = ["evaluate", "newest_run", "open_run", "read_run_config"]


def evaluate(
    package: PackageId,
    run: Path,
    *,
    split: str | None = None,
    device: str = "auto",
    draw: DrawPredictions | None = None,
) -> tuple[str, dict[str, float]]:
    """Metrics of a run's selected weights on one of its splits.

    Args:
        package: The task package.
        run: Run directory.
        split: ``"test"`` or ``"val"``; None takes the test split, or validation where the recipe has none.
        device: Where to compute.
        draw: Draws what ``train`` draws, into ``<run>/eval_<split>``.

    Returns:
        The split, and its metrics by name.

    Raises:
        EngineError: if the directory is no run of this package, or its recipe has no such split.
    """
    config = read_run_config(package, run)
    there = [name for name in ("test", "val") if f"{name}_dataloader" in config]
    if not there:
        raise EngineError(f"eval: the recipe of {run} has neither a test nor a val split")
    split = split or there[0]
    if split not in there:
        raise EngineError(f"eval: the recipe of {run} has no {split} split; use --split {there[0]}")
    best_or_newest(run)
    kept = {key: value for key, value in config.items() if not key.startswith(("train_", "optim", "param_", "custom_"))}
    kept |= {"device": device, "strategy": {"type": "ddp"}, "work_dir": str(run), "load_from": str(run)}
    kept["default_hooks"] = {}
    runner = Runner.from_cfg(kept)
    try:
        metrics = runner.test() if split == "test" else runner.val()
        if draw is not None:
            draw_split(runner, split, draw, run / f"eval_{split}")
        return split, {name: float(value) for name, value in metrics.items()}
    finally:
        runner.close()


def open_run(package: PackageId, run: str | Path | None, *, device: str = "auto") -> TrainedRun:
    """The model of a run with its selected weights.

    Args:
        package: The task package.
        run: Run directory; None means the newest under ``runs``.
        device: Where to put the model.

    Raises:
        EngineError: if there is no such run, it is one of another package, or it has no intact checkpoint.
    """
    place = choose_device(device)
    directory = newest_run(package) if run is None else local_file(str(run))
    config = read_run_config(package, directory)
    checkpoint = best_or_newest(directory)
    silence_console("mmengine")
    model: nn.Module = build(config["model"])
    load_weights(model, checkpoint.read_weights(), str(checkpoint.weights_path))
    return TrainedRun(
        directory=directory,
        config=config,
        model=model.to(place).eval(),
        device=place,
        checkpoint=checkpoint.weights_path,
        data_info=_data_info(directory),
    )


def _data_info(directory: Path) -> dict[str, Any]:
    """What the training data said about itself: from ``run.json``, or where that is damaged from a checkpoint."""
    about = about_run(directory).get("data_info")
    if about is None:
        checkpoint, _ = newest_intact(directory, readable=Checkpoint.read_state)
        about = checkpoint.read_state().get("data_info") if checkpoint else None
    return about or {}


def read_run_config(package: PackageId, run: Path) -> dict[str, Any]:
    """The resolved recipe of a run; nothing in its files is executed.

    Raises:
        EngineError: if the directory is not a run, or one of another package.
    """
    return load_recipe(require_run(package, run), scope=package.module, literal=True)
