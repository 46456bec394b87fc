"""One run from the first step to the pictures, and what is done with it afterwards."""

import json
import logging
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from attn_core.engine.averaging import EMAHook
from attn_core.engine.checkpoint import best_or_newest, list_checkpoints, load_weights
from attn_core.engine.config import find_recipe, load_recipe, write_config
from attn_core.engine.distributed import choose_device, same_everywhere, start_processes, stop_processes
from attn_core.engine.errors import ConfigError, EngineError
from attn_core.engine.hub import local_file
from attn_core.engine.package import DrawPredictions, PackageId, TrainedRun
from attn_core.engine.pictures import draw_curves
from attn_core.engine.reporting import MetricsHook, ProgressHook
from attn_core.engine.runner import Runner, silence_console
from attn_core.engine.scopes import open_scope

logger = logging.getLogger(__name__)

RUNS = Path("runs")
_VERSIONED = ("attn-core", "torch", "mmengine", "numpy", "safetensors", "timm", "triton")


@dataclass(frozen=True)
class TrainOptions:
    """The options of ``train``.

    Attributes:
        recipe: Name or path; None means the package's default, or with ``resume`` the recipe of the run.
        out: Run directory; None means ``runs/<recipe>``, numbered if that is taken.
        resume: Continue the run in ``out``, or without ``out`` the newest run of the recipe.
        overrides: ``key=value`` settings.
        amp: bfloat16 autocast.
        launcher: ``"none"`` or ``"pytorch"`` (started by torchrun).
        strategy: ``"ddp"`` or ``"fsdp2"``; None means the recipe's.
        seed: None means the recipe's, or 0.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``.
        tensorboard: Write TensorBoard files as well.
        wandb: Send to Weights & Biases as well.
    """

    recipe: str | None = None
    out: Path | None = None
    resume: bool = False
    overrides: Sequence[str] = ()
    amp: bool = False
    launcher: str = "none"
    strategy: str | None = None
    seed: int | None = None
    device: str = "auto"
    tensorboard: bool = False
    wandb: bool = False


@dataclass
class TrainResult:
    """What ``train`` has made.

    Attributes:
        directory: The run directory.
        metrics: Of the test split with the best weights; of nothing if the recipe has no test split.
        seconds: Wall time of training and test.
        processor_seconds: Time of all processor cores of this process; on a busy machine the one that says something.
        files: Names of the files written at the end.
    """

    directory: Path
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    processor_seconds: float = 0.0
    files: list[str] = field(default_factory=list)


def prepare(package: PackageId, options: TrainOptions) -> tuple[dict[str, Any], Path]:
    """The complete recipe and the run directory, before anything is built.

    Raises:
        ConfigError: if an option, the recipe or an override is wrong.
        EngineError: if the directory holds another run.
    """
    stored = _stored_run(package, options)
    if stored is not None:
        recipe, path, directory = stored
    else:
        recipe = options.recipe or package.default_recipe
        path = find_recipe(package.module, recipe)
        directory = options.out or _free_directory(RUNS / path.stem)
    open_scope(package.module)
    config = load_recipe(path, options.overrides, scope=package.module, literal=stored is not None)
    if options.amp:
        config["optim_wrapper"]["amp"] = True
    if options.seed is not None:
        config["randomness"]["seed"] = options.seed
    if options.strategy is not None:
        config["strategy"] = {**config["strategy"], "type": options.strategy}
    if options.device != "auto" or "device" not in config:
        config["device"] = options.device
    if config["strategy"]["type"] != "ddp" and options.launcher == "none":
        raise ConfigError(f"train: --strategy {config['strategy']['type']} needs several processes; use torchrun and "
                          "--launcher pytorch")  # fmt: skip
    return config, directory


def train(
    package: PackageId, options: TrainOptions, *, say: Any = print, draw: DrawPredictions | None = None
) -> TrainResult:
    """Train a recipe, test the best weights once, draw the pictures.

    Args:
        package: The task package.
        options: See `TrainOptions`.
        say: Called with lines for the user, on process 0 only.
        draw: Writes ``predictions.png`` (see `TaskPackage.draw_predictions`).
    """
    device = choose_device(options.device)
    start_processes(options.launcher, device)
    config, directory = same_everywhere(prepare(package, options))
    main = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    began, worked = time.perf_counter(), time.process_time()
    fresh = not (directory / "config.py").exists()
    try:
        runner = _build(config, directory, options, package)
    except BaseException:
        if main and fresh:
            _discard(directory)
        raise
    trained = False
    try:
        sizes = {split: len(getattr(runner, f"{split}_dataloader").dataset) for split in _splits(config)}
        if main:
            _write_about(package, options, config, directory, runner, sizes)
            parameters = sum(p.numel() for p in runner.bare_model.parameters())
            say("data: " + ", ".join(f"{split} {size:,}" for split, size in sizes.items()) + " samples")
            say(f"model: {parameters:,} parameters on {_place(runner)}, seed {runner.seed}, run directory {directory}")
        runner.train()
        trained = True
        result = TrainResult(directory)
        runner.load_best()
        if "test_dataloader" in config:
            result.metrics = {name: float(value) for name, value in runner.test().items()}
        result.seconds, result.processor_seconds = time.perf_counter() - began, time.process_time() - worked
        if main:
            result.files = _finish(runner, config, result, draw)
        return result
    finally:
        for hook in runner.hooks:
            if isinstance(hook, MetricsHook | ProgressHook):
                hook.close()
        runner.close()
        if main and fresh and not trained:
            _discard(directory)
        if options.launcher != "none" and sys.exc_info()[0] is None:
            stop_processes()


def evaluate(
    package: PackageId, run: Path, *, split: str = "test", device: str = "auto", draw: DrawPredictions | None = None
) -> dict[str, float]:
    """Metrics of a run's best weights on one of its splits; ``draw`` writes into ``<run>/eval_<split>``."""
    config = read_run_config(package, run)
    if f"{split}_dataloader" not in config:
        raise EngineError(f"eval: the recipe of {run} has no {split} split; it has {', '.join(_splits(config))}")
    best_or_newest(run)
    kept = {key: value for key, value in config.items() if not key.startswith(("train_", "optim", "param_", "custom_"))}
    kept |= {"device": device, "strategy": {"type": "ddp"}, "work_dir": str(run), "load_from": str(run)}
    kept["default_hooks"] = {}
    runner = Runner.from_cfg(kept)
    try:
        metrics = runner.test() if split == "test" else runner.val()
        if draw is not None:
            _draw(runner, split, draw, run / f"eval_{split}")
        return {name: float(value) for name, value in metrics.items()}
    finally:
        runner.close()


def open_run(package: PackageId, run: str | Path | None, *, device: str = "auto") -> TrainedRun:
    """The model of a run with its best weights.

    Args:
        package: The task package.
        run: Run directory; None means the newest under ``runs``.
        device: Where to put the model.
    """
    directory = newest_run(package) if run is None else local_file(str(run))
    config = read_run_config(package, directory)
    checkpoint = best_or_newest(directory)
    silence_console("mmengine")
    with DefaultScope.overwrite_default_scope(config["default_scope"]):
        model: nn.Module = MODELS.build(config["model"])
    load_weights(model, checkpoint.read_weights(), str(checkpoint.weights_path))
    place = choose_device(device)
    about = json.loads((directory / "run.json").read_text()) if (directory / "run.json").is_file() else {}
    return TrainedRun(
        directory=directory,
        config=config,
        model=model.to(place).eval(),
        device=place,
        checkpoint=checkpoint.weights_path,
        data_info=about.get("data_info", {}),
    )


def newest_run(package: PackageId) -> Path:
    """The run of this package under ``runs`` that was written to last.

    Raises:
        EngineError: if there is none.
    """
    runs = [path.parent for path in RUNS.glob("*/run.json") if _about(path.parent).get("package") == package.name]
    runs = [run for run in runs if list_checkpoints(run) or list_checkpoints(run, best=True)]
    if not runs:
        raise EngineError(f"no trained run in {RUNS}/; train one first: {package.name} train")
    return max(runs, key=lambda run: (run / "metrics.jsonl").stat().st_mtime if (run / "metrics.jsonl").exists() else 0)


def read_run_config(package: PackageId, run: Path) -> dict[str, Any]:
    """The resolved recipe of a run.

    Raises:
        EngineError: if the directory is not a run.
    """
    path = run / "config.py"
    if not path.is_file():
        what = "is not a run directory (no config.py)" if run.exists() else "does not exist"
        raise EngineError(f"{run} {what}; runs are the directories that '{package.name} train' writes")
    open_scope(package.module)
    return load_recipe(path, scope=package.module, literal=True)


def _stored_run(package: PackageId, options: TrainOptions) -> tuple[str, Path, Path] | None:
    """Recipe name, config file and directory of the run to resume; None if a run is to be started."""
    directory = options.out
    if directory is None and options.resume:
        recipe = Path(options.recipe or package.default_recipe).stem
        runs = [path.parent for path in RUNS.glob("*/run.json") if _about(path.parent).get("recipe") == recipe]
        directory = max(runs, key=lambda run: (run / "config.py").stat().st_mtime, default=None)
    if directory is None:
        return None
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"train: --out {directory} is a file")
    written = directory / "config.py"
    if not written.is_file():
        if directory.is_dir() and any(directory.iterdir()):
            raise EngineError(f"train: {directory} is not empty and holds no run; choose another --out")
        return None
    if not options.resume:
        newest = next(iter(list_checkpoints(directory)), "no checkpoint")
        raise EngineError(
            f"train: {directory} holds a run already ({newest}); continue it with --resume or choose another --out"
        )
    recipe = str(_about(directory).get("recipe", ""))
    if options.recipe is not None and recipe and Path(options.recipe).stem != recipe:
        raise ConfigError(f"train: {directory} is a run of {recipe!r}, not of {options.recipe!r}; leave the recipe out")
    return recipe or "run", written, directory


def _free_directory(wanted: Path) -> Path:
    candidate, number = wanted, 1
    while candidate.exists() and any(candidate.iterdir()):
        number += 1
        candidate = wanted.with_name(f"{wanted.name}_{number}")
    return candidate


def _discard(directory: Path) -> None:
    """Remove a run that failed before its first result, so that the next attempt finds its place free."""
    metrics = directory / "metrics.jsonl"
    if list_checkpoints(directory) or (metrics.exists() and metrics.stat().st_size):
        return
    for name in ("config.py", "run.json", "metrics.jsonl", "train.log"):
        (directory / name).unlink(missing_ok=True)
    if directory.is_dir() and not any(directory.iterdir()):
        directory.rmdir()


def _build(config: dict[str, Any], directory: Path, options: TrainOptions, package: PackageId) -> Runner:
    settings = {**config, "work_dir": str(directory), "resume": options.resume, "launcher": options.launcher}
    backends = []
    if options.tensorboard:
        backends.append({"type": "TensorboardVisBackend", "save_dir": str(directory / "tensorboard")})
    if options.wandb:
        arguments = {"project": package.name, "name": directory.name, "dir": str(directory)}
        backends.append({"type": "WandbVisBackend", "save_dir": str(directory), "init_kwargs": arguments})
    if backends:
        settings["visualizer"] = {"type": "Visualizer", "vis_backends": backends, "save_dir": str(directory)}
    if settings.get("load_from"):
        settings["load_from"] = str(local_file(settings["load_from"]))
    try:
        return Runner.from_cfg(settings)
    except TypeError as error:
        if "unexpected keyword argument" in str(error) or "missing" in str(error):
            raise ConfigError(f"recipe: {error}") from error
        raise


def _splits(config: Mapping[str, Any]) -> list[str]:
    return [split for split in ("train", "val", "test") if f"{split}_dataloader" in config]


def _place(runner: Runner) -> str:
    name = torch.cuda.get_device_name(runner.device) if runner.device.type == "cuda" else "CPU"
    return name if runner.world_size == 1 else f"{runner.world_size} × {name} ({runner.strategy.get('type', 'ddp')})"


def _about(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / "run.json").read_text())
    except (OSError, ValueError):
        return {}


def _write_about(
    package: PackageId,
    options: TrainOptions,
    config: dict[str, Any],
    directory: Path,
    runner: Runner,
    sizes: dict[str, int],
) -> None:
    """``config.py`` (the resolved recipe) and ``run.json`` (command, versions, data)."""
    previous = _about(directory)
    recipe = previous.get("recipe") or Path(options.recipe or package.default_recipe).stem
    write_config(config, directory / "config.py", f"Resolved recipe of a run of {package.name}: {recipe}.")
    metainfo = getattr(runner.train_dataloader.dataset, "metainfo", None)
    about = {
        "package": package.name,
        "recipe": recipe,
        "commands": [*previous.get("commands", []), sys.argv],
        "started": previous.get("started") or datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": platform.platform(),
        "device": _place(runner),
        "versions": {name: found for name in (*_VERSIONED, package.name) if (found := _version(name))},
        "data": sizes,
        "data_info": dict(metainfo) if isinstance(metainfo, Mapping) else {},
    }
    (directory / "run.json").write_text(json.dumps(about, indent=1, default=str) + "\n")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _finish(runner: Runner, config: dict[str, Any], result: TrainResult, draw: DrawPredictions | None) -> list[str]:
    """Write ``result.json`` and the pictures; a picture that fails is reported, the run stands."""
    directory = result.directory
    best = next(iter(list_checkpoints(directory, best=True)), None)
    times = {"seconds": round(result.seconds, 2), "processor_seconds": round(result.processor_seconds, 2)}
    content = {"test": result.metrics, "checkpoint": best or f"step_{runner.iter}", **times}
    (directory / "result.json").write_text(json.dumps(content, indent=1) + "\n")
    written = ["result.json"]
    if (directory / "metrics.jsonl").exists():
        chosen = int(best.rsplit("_", 1)[1]) if best else None
        draw_curves(directory / "metrics.jsonl", directory / "curves.png", chosen=chosen)
        written.append("curves.png")
    split = next((split for split in ("test", "val") if f"{split}_dataloader" in config), None)
    if draw is not None and split is not None and runner.world_size == 1:
        written += _draw(runner, split, draw, directory)
    return written


def _draw(runner: Runner, split: str, draw: DrawPredictions, folder: Path) -> list[str]:
    """``predictions.png`` and what the package writes beside it; gives their names."""
    folder.mkdir(exist_ok=True)
    runner.bare_model.eval()
    averages = [hook for hook in runner.hooks if isinstance(hook, EMAHook)]
    for hook in averages:  # the weights that were tested
        hook.before_test_epoch(runner)
    try:
        with torch.inference_mode():
            further = draw(runner.bare_model, getattr(runner, f"{split}_dataloader"), folder / "predictions.png")
    finally:
        for hook in averages:
            hook.after_test_epoch(runner)
    return ["predictions.png", *(further or ())]
