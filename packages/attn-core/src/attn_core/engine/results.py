"""What a run says and leaves: the lines at its start, ``run.json``, ``result.json`` and the pictures."""

import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from attn_core.engine.checkpoint import list_checkpoints
from attn_core.engine.config import RECIPE_COPY, write_config
from attn_core.engine.package import DrawPredictions
from attn_core.engine.pictures import draw_curves
from attn_core.engine.prepare import Plan
from attn_core.engine.run_directory import CONFIG, about_run
from attn_core.engine.runner import Runner

_VERSIONED = ("attn-core", "torch", "mmengine", "numpy", "safetensors", "timm", "triton")
SPLITS = ("train", "val", "test")


@dataclass
class TrainResult:
    """What ``train`` has made.

    Attributes:
        directory: The run directory.
        metrics: Of the test split with the selected weights; of nothing if the recipe has no test split.
        seconds: Wall time of training and test.
        processor_seconds: Time of all processor cores of this process; on a busy machine the one that says something.
        files: Names of the files written at the end.
    """

    directory: Path
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    processor_seconds: float = 0.0
    files: list[str] = field(default_factory=list)


class Stopwatch:
    """Wall time and processor time since it was made, in seconds."""

    def __init__(self) -> None:
        self._began = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        """Both, in this order."""
        return time.perf_counter() - self._began[0], time.process_time() - self._began[1]


def splits(config: Mapping[str, Any]) -> list[str]:
    """Those that a recipe has data for."""
    return [split for split in SPLITS if f"{split}_dataloader" in config]


def describe_run(plan: Plan, runner: Runner) -> None:
    """Write ``config.py`` (the resolved recipe), ``recipe.py`` and ``run.json`` (command, versions, data)."""
    sizes = _sizes(plan, runner)  # builds the data sets, on every process
    if runner.rank != 0:
        return
    directory, package = plan.directory, plan.package
    previous = about_run(directory)
    write_config(plan.config, directory / CONFIG, f"Resolved recipe of a run of {package.name}: {plan.recipe}.")
    if plan.recipe_text:
        (directory / RECIPE_COPY).write_text(plan.recipe_text, encoding="utf-8")
    metainfo = getattr(runner.train_dataloader.dataset, "metainfo", None)
    about = {
        "package": package.name,
        "recipe": plan.recipe,
        "commands": [*previous.get("commands", []), sys.argv],
        "started": previous.get("started") or datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "device": _place(runner),
        "versions": {name: found for name in (*_VERSIONED, package.name) if (found := _version(name))},
        "data": sizes,
        "data_info": dict(metainfo) if isinstance(metainfo, Mapping) else {},
    }
    (directory / "run.json").write_text(json.dumps(about, indent=1, default=str) + "\n", encoding="utf-8")


def announce(plan: Plan, runner: Runner, say: Callable[[str], object]) -> None:
    """Data, batch, model and place, for the user; on process 0."""
    if runner.rank != 0:
        return
    sizes, config = _sizes(plan, runner), plan.config
    say(
        "data: "
        + ", ".join(f"{split} {size:,}" for split, size in sizes.items())
        + " samples; "
        + _batch(runner, config)
    )
    parameters = sum(p.numel() for p in runner.bare_model.parameters())
    say(f"model: {parameters:,} parameters on {_place(runner)}, seed {runner.seed}, run directory {plan.directory}")


def report(
    plan: Plan, runner: Runner, metrics: dict[str, float], watch: Stopwatch, draw: DrawPredictions | None
) -> TrainResult:
    """Write ``result.json``, ``curves.png`` and, from one process, ``predictions.png``.

    The model holds the weights that were tested. Other processes than the first write nothing.
    """
    seconds, processor_seconds = watch.read()
    directory = plan.directory
    result = TrainResult(directory, metrics, seconds, processor_seconds)
    if runner.rank != 0:
        return result
    best = next(iter(list_checkpoints(directory, best=True)), None)
    times = {"seconds": round(seconds, 2), "processor_seconds": round(processor_seconds, 2)}
    content = {"test": metrics, "checkpoint": best or f"step_{runner.iter}", **times}
    (directory / "result.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    result.files.append("result.json")
    if (directory / "metrics.jsonl").exists():
        chosen = int(best.rsplit("_", 1)[1]) if best else None
        draw_curves(directory / "metrics.jsonl", directory / "curves.png", chosen=chosen)
        result.files.append("curves.png")
    split = next((split for split in ("test", "val") if split in splits(plan.config)), None)
    if draw is not None and split is not None and runner.world_size == 1:
        result.files += draw_split(runner, split, draw, directory)
    return result


def draw_split(runner: Runner, split: str, draw: DrawPredictions, folder: Path) -> list[str]:
    """``predictions.png`` of the weights that the model holds, and what the package writes beside it; their names."""
    folder.mkdir(exist_ok=True)
    with torch.inference_mode():
        further = draw(runner.bare_model.eval(), getattr(runner, f"{split}_dataloader"), folder / "predictions.png")
    return ["predictions.png", *(further or ())]


def _sizes(plan: Plan, runner: Runner) -> dict[str, int]:
    return {split: len(getattr(runner, f"{split}_dataloader").dataset) for split in splits(plan.config)}


def _batch(runner: Runner, config: Mapping[str, Any]) -> str:
    """``batch 64``: samples of an update over all processes, and what they are made of where that is not plain."""
    whole = int(config["train_dataloader"].get("batch_size", 1))
    times = int(config["optim_wrapper"].get("accumulative_counts", 1))
    parts = []
    if runner.world_size > 1:
        parts.append(f"{runner.world_size} processes × {whole // runner.world_size}")
    if times > 1:
        parts.append(f"{whole} × {times} accumulated" if not parts else f"× {times} accumulated")
    return f"batch {whole * times}" + (f" ({' '.join(parts)})" if parts else "")


def _place(runner: Runner) -> str:
    name = torch.cuda.get_device_name(runner.device) if runner.device.type == "cuda" else runner.device.type.upper()
    return name if runner.world_size == 1 else f"{runner.world_size} × {name} ({runner.strategy.get('type', 'ddp')})"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
