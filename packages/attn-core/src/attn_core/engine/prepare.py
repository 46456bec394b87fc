"""Before a run: its options, its complete recipe and its directory. Nothing is built here and nothing is written."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attn_core.engine.config import RECIPE_COPY, find_recipe, load_recipe, read_recipe
from attn_core.engine.distributed import choose_device
from attn_core.engine.errors import ConfigError
from attn_core.engine.hub import local_file
from attn_core.engine.package import PackageId
from attn_core.engine.run_directory import CONFIG, about_run, free_directory, run_to_resume


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


@dataclass(frozen=True)
class Plan:
    """A run that can begin.

    Attributes:
        package: Whose run it is.
        recipe: Name of the recipe.
        recipe_text: The recipe, its bases in place; kept in the run, so that its variables keep their meaning.
        config: The complete settings, as plain data.
        directory: The run directory.
        options: What the user asked for.
    """

    package: PackageId
    recipe: str
    recipe_text: str
    config: dict[str, Any]
    directory: Path
    options: TrainOptions


def prepare(package: PackageId, options: TrainOptions) -> Plan:
    """Find the recipe and the directory, apply the options, and refuse what cannot work.

    Raises:
        ConfigError: if an option, the recipe or an override is wrong.
        EngineError: if the directory holds another run, or there is none to resume.
    """
    _require_writers(options)
    if options.resume:
        directory = run_to_resume(package, options.out, options.recipe)
        recipe, path = str(about_run(directory).get("recipe", "run")), directory / CONFIG
        kept = directory / RECIPE_COPY
        text = kept.read_text(encoding="utf-8") if kept.is_file() else ""
    else:
        path = find_recipe(package.module, options.recipe or package.default_recipe)
        recipe, text = path.stem, read_recipe(path).text
        directory = free_directory(options.out, recipe)
    config = load_recipe(path, options.overrides, scope=package.module, literal=options.resume)
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
    choose_device(config["device"])
    if config.get("load_from"):
        config["load_from"] = str(local_file(config["load_from"]))
    return Plan(package, recipe, text, config, directory, options)


def _require_writers(options: TrainOptions) -> None:
    for flag, asked, module in (("wandb", options.wandb, "wandb"), ("tensorboard", options.tensorboard, "tensorboard")):
        if asked and importlib.util.find_spec(module) is None:
            raise ConfigError(f"train: --{flag} needs the package {module}; install the extra {flag!r}")
