"""mmengine's Runner for today's torch: CPU and GPU, one process or many, safe checkpoints, exact resumption."""

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_dist_info
from mmengine.evaluator import Evaluator
from mmengine.hooks import EMAHook as MMEngineEMAHook
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.model import is_model_wrapper, revert_sync_batchnorm
from mmengine.model.base_module import BaseModule
from mmengine.runner import BaseLoop
from mmengine.runner import Runner as _Runner
from mmengine.visualization import Visualizer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from attn_core.catalog import did_you_mean
from attn_core.engine.checkpoint import (
    Checkpoint,
    best_or_newest,
    check_weights,
    full,
    load_weights,
    newest_intact,
    read_weights,
    remove_leftovers,
    write_checkpoint,
)
from attn_core.engine.distributed import choose_device, same_everywhere, spread, start_processes
from attn_core.engine.errors import CheckpointError, ConfigError, building
from attn_core.engine.loops import EpochLoop, StepLoop
from attn_core.engine.names import resolve
from attn_core.engine.optim import GroupedConstructor, OptimWrapper
from attn_core.engine.prepare import Plan
from attn_core.engine.reporting import MetricsHook, ProgressHook
from attn_core.engine.resuming import restore_optimizer, restore_schedules
from attn_core.engine.sampling import build_dataloader
from attn_core.engine.schedules import fit
from attn_core.engine.task import TaskModel

logger = logging.getLogger(__name__)

_KEPT_HISTORY = 1000  # values per scalar of mmengine's message hub; the whole history is in metrics.jsonl


class Runner(_Runner):
    """Trains, validates and tests one recipe.

    Differences from mmengine's Runner, besides those listed in the modules of this package: the run directory holds no
    time-stamped folders; ``device`` and ``strategy`` are keys of the config; ``resume`` takes the newest intact
    checkpoint of the run directory.
    """

    device: torch.device

    def __init__(self, *args: Any, cfg: Any = None, **kwargs: Any) -> None:
        config = cfg if cfg is not None else {}
        self.device = choose_device(config.get("device", "auto"))
        self.strategy: Mapping[str, Any] = dict(config.get("strategy") or {"type": "ddp"})
        self.is_training = False
        self.skipped_checkpoints: list[str] = []
        super().__init__(*args, cfg=cfg, **kwargs)

    @classmethod
    def from_cfg(cls, cfg: Any) -> "Runner":
        """Build from a complete recipe (see `attn_core.engine.config`)."""
        config = Config(dict(cfg), format_python_code=False) if not isinstance(cfg, Config) else cfg
        config.pop("variables", None)
        if not config.get("experiment_name"):
            config.experiment_name = "run"
        if config.get("launcher", "none") == "none" and config.get("strategy", {}).get("type", "ddp") != "ddp":
            raise ConfigError(f"strategy: {config.strategy['type']} needs several processes; add --launcher pytorch")
        return super().from_cfg(config)  # type: ignore[return-value]

    # ---- environment: quiet, and without mmengine's CUDA assumptions

    @property
    def timestamp(self) -> str:
        """Empty: mmengine makes its log folder from it, and a run directory needs none."""
        return ""

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.work_dir)

    @property
    def bare_model(self) -> nn.Module:
        """The task model inside its DDP wrapper, or itself."""
        return self.model.module if is_model_wrapper(self.model) else self.model  # type: ignore[return-value]

    def setup_env(self, env_cfg: dict[str, Any]) -> None:
        """Join the other processes."""
        start_processes(self.launcher, self.device)
        self._rank, self._world_size = get_dist_info()
        # mmengine keeps loggers and histories by this name for the life of the process
        self._timestamp = f"{time.time_ns()}_{os.getpid()}"
        torch.backends.cudnn.benchmark = bool(env_cfg.get("cudnn_benchmark", False))

    def build_logger(self, log_level: int | str = "INFO", log_file: str | None = None, **kwargs: Any) -> MMLogger:  # noqa: ARG002  mmengine's signature
        """mmengine's logger, into ``train.log`` only: the console belongs to the progress display."""
        silence_console("mmengine")
        name = self._experiment_name
        path = str(self.directory / "train.log") if self.rank == 0 else None
        log = MMLogger.get_instance(name, log_file=path, log_level=log_level, file_mode="a")
        silence_console(name)
        return log

    def build_visualizer(self, visualizer: Visualizer | dict[str, Any] | None = None) -> Visualizer:
        """A visualizer that writes nothing unless the recipe names a backend."""
        if visualizer is None:
            visualizer = {"type": "Visualizer", "vis_backends": [], "save_dir": str(self.directory)}
        return super().build_visualizer(visualizer)

    def dump_config(self) -> None:
        """Nothing: the resolved recipe is written before the Runner is built (see `attn_core.engine.config`)."""

    def _log_env(self, env_cfg: dict[str, Any]) -> None:  # noqa: ARG002  mmengine's signature
        # mmengine's version starts compilers to ask for their versions, which takes seconds.
        self.logger.info(f"torch {torch.__version__}, {self.device}, {self.world_size} process(es), seed {self.seed}")

    def close(self) -> None:
        """Close log files and metric writers."""
        self.visualizer.close()
        for handler in list(self.logger.handlers):
            handler.close()
            self.logger.removeHandler(handler)

    # ---- parts

    def wrap_model(self, model_wrapper_cfg: dict[str, Any] | None, model: nn.Module) -> nn.Module:  # noqa: ARG002  mmengine's signature
        """Move to the device; wrap or shard if there are several processes."""
        model = model.to(self.device)
        if not self.distributed:
            has_sync = any(isinstance(m, nn.SyncBatchNorm) for m in model.modules())
            return revert_sync_batchnorm(model) if has_sync else model
        if self.cfg.get("sync_bn"):
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        unused = bool(self.cfg.get("find_unused_parameters", False))
        return spread(model, self.device, self.strategy, find_unused_parameters=unused)

    def _init_model_weights(self) -> None:
        # Networks initialize themselves; models written for mmengine are the exception.
        if not isinstance(self.bare_model, TaskModel) and isinstance(self.bare_model, BaseModule):
            super()._init_model_weights()

    @staticmethod
    def build_dataloader(
        dataloader: DataLoader | dict[str, Any],
        seed: int | None = None,
        diff_rank_seed: bool = False,  # noqa: ARG004  mmengine's signature
    ) -> DataLoader:
        """See `attn_core.engine.sampling.build_dataloader`."""
        if isinstance(dataloader, DataLoader):
            return dataloader
        with building("a dataloader"):
            return build_dataloader(dataloader, seed=seed or 0, world_size=get_dist_info()[1])

    def build_train_loop(self, loop: BaseLoop | dict[str, Any]) -> BaseLoop:
        """A resumable loop, unless the recipe names another one."""
        if isinstance(loop, dict) and "type" not in loop:
            options = dict(loop)
            by_epoch = options.pop("by_epoch", "max_epochs" in options)
            loop = {"type": EpochLoop if by_epoch else StepLoop, **options}
        with building("train_cfg"):
            return super().build_train_loop(loop)  # type: ignore[arg-type]

    def build_val_loop(self, loop: Any) -> BaseLoop:
        """mmengine's, or the recipe's."""
        with building("val_cfg"):
            return super().build_val_loop(loop)

    def build_test_loop(self, loop: Any) -> BaseLoop:
        """mmengine's, or the recipe's."""
        with building("test_cfg"):
            return super().build_test_loop(loop)

    def build_evaluator(self, evaluator: Any) -> Evaluator:
        """mmengine's evaluator of the recipe's metrics."""
        with building("val_evaluator or test_evaluator"):
            return super().build_evaluator(evaluator)

    def register_hook(self, hook: Any, priority: Any = None) -> None:
        """A hook of the recipe."""
        with building("default_hooks or custom_hooks"):
            super().register_hook(hook, priority)

    def build_optim_wrapper(self, optim_wrapper: Any) -> Any:
        """The wrapper with the non-finite guard; a recipe may name a subclass of it.

        Raises:
            ConfigError: if the recipe names a wrapper without the guard.
        """
        if isinstance(optim_wrapper, dict) and "optimizer" in optim_wrapper:
            optim_wrapper = {"type": OptimWrapper, "constructor": GroupedConstructor, **optim_wrapper}
            kind = optim_wrapper["type"]
            kind = resolve(kind) if isinstance(kind, str) else kind
            if not (isinstance(kind, type) and issubclass(kind, OptimWrapper)):
                raise ConfigError(
                    f"optim_wrapper.type: {optim_wrapper['type']} does not stop at a non-finite loss; "
                    "leave the type out, or derive from attn_core.engine.optim.OptimWrapper"
                )
        try:
            with building("optim_wrapper"):
                return super().build_optim_wrapper(optim_wrapper)
        except ValueError as error:
            raise error if isinstance(error, ConfigError) else ConfigError(f"optim_wrapper: {error}") from error

    def _build_param_scheduler(self, scheduler: Any, optim_wrapper: Any) -> list[Any]:
        schedules = scheduler if isinstance(scheduler, list | tuple) else [scheduler]
        fitted, line = fit(schedules, epochs=self.max_epochs, steps=self.max_iters)
        if line and self.rank == 0:
            logger.warning("%s", line)
        try:
            with building("param_scheduler"):
                built = super()._build_param_scheduler(fitted, optim_wrapper)
        except ValueError as error:
            raise error if isinstance(error, ConfigError) else ConfigError(f"param_scheduler: {error}") from error
        for schedule in built:
            optimizer: Any = schedule.optimizer
            optimizer._global_step = 0  # mmengine warns of a first step without update: accumulation has some
        return built

    def register_default_hooks(self, hooks: Any = None) -> None:
        """The hooks of the config and no others (see `attn_core.engine.config` for what a recipe gets)."""
        for hook in (hooks or {}).values():
            if hook is not None:
                self.register_hook(hook)

    def train(self) -> nn.Module:
        """Train from the start or from the newest intact checkpoint."""
        for hook in self.hooks:
            if isinstance(hook, MMEngineEMAHook):
                # It tests the last parameters when the selected weights were loaded, and cannot copy shards.
                raise ConfigError("custom_hooks: mmengine's EMAHook is not supported; use attn_core.engine.EMAHook")
        self._check_checkpointing()
        self.is_training = True
        try:
            return super().train()
        finally:
            self.is_training = False

    def _check_checkpointing(self) -> None:
        """Refuse names of modules that the model does not have."""
        names = self.cfg.get("activation_checkpointing") or []
        for name in [names] if isinstance(names, str) else names:
            try:
                found = attrgetter(name)(self.bare_model)
            except (AttributeError, TypeError):
                found = None
            if not isinstance(found, nn.Module):
                known = dict(self.bare_model.named_modules())
                raise ConfigError(
                    f"activation_checkpointing: the model has no module {name!r}{did_you_mean(str(name), known)}"
                )

    def test_selected(self) -> dict[str, float]:
        """Metrics of the test split with the weights that are kept for use, which the model then holds.

        Those are the best ones, or without a choice the last ones, averaged where the recipe averages. Empty without a
        test split.
        """
        if self.load_best() is None:
            newest = same_everywhere(best_or_newest(self.directory).name if self.rank == 0 else None)
            self.load_weights_from(self.directory / f"{newest}.safetensors")
        if self._test_loop is None:
            return {}
        return {name: float(value) for name, value in self.test().items()}

    # ---- checkpoints

    def write_state(self, step: int, epoch: int) -> Checkpoint | None:
        """Write a checkpoint to resume from; all processes must call it, process 0 writes and gets it back.

        Args:
            step: Steps done.
            epoch: Epochs done, validation included.
        """
        content = self._collect(step, epoch)
        weights = content.pop("state_dict")
        about = {"step": step, "epoch": epoch, "seed": self.seed, "model": type(self.bare_model).__name__}
        if self.rank != 0:
            return None
        return write_checkpoint(self.directory, f"step_{step}", weights, content, about)

    def write_best(self, step: int, epoch: int, metrics: Mapping[str, float]) -> Checkpoint | None:
        """Write the weights alone, as the best so far; all processes must call it."""
        content: dict[str, Any] = {"state_dict": self._whole_weights()}
        self.call_hook("before_save_checkpoint", checkpoint=content)
        about = {"step": step, "epoch": epoch, "model": type(self.bare_model).__name__, "metrics": dict(metrics)}
        if self.rank != 0:
            return None
        return write_checkpoint(self.directory, f"best_step_{step}", content["state_dict"], None, about)

    def load_or_resume(self) -> None:
        """Follow ``resume`` and ``load_from`` of the config, once."""
        if self._has_loaded:
            return
        if self.rank == 0:
            remove_leftovers(self.directory)
        if self._resume:
            checkpoint = self.find_checkpoint()
            if checkpoint is not None:
                self.resume_from(checkpoint)
        elif self._load_from is not None:
            self.load_weights_from(Path(self._load_from))
        self._has_loaded = True

    def find_checkpoint(self) -> Checkpoint | None:
        """The newest intact checkpoint; None in a directory without any.

        Raises:
            CheckpointError: if there are checkpoints and all are damaged.
        """
        found, skipped = (None, [])
        if self.rank == 0:
            found, skipped = newest_intact(self.directory, readable=Checkpoint.read_state)
        found, skipped = same_everywhere((found, skipped))
        self.skipped_checkpoints = skipped
        for line in skipped if self.rank == 0 else ():
            logger.warning("skipped: %s", line)
        if found is None and skipped:
            raise CheckpointError(f"{skipped[0]}; no intact checkpoint is left in {self.directory}")
        return found

    def resume_from(self, checkpoint: Checkpoint) -> None:
        """Continue exactly where a checkpoint was written.

        Raises:
            CheckpointError: if it belongs to another model or to data of another size.
        """
        content = checkpoint.read_state()
        content["state_dict"] = checkpoint.read_weights()
        check_weights(self.bare_model, content["state_dict"], str(checkpoint.weights_path))
        batches = len(self.train_dataloader)
        if content["batches_per_epoch"] != batches:
            raise CheckpointError(
                f"resume: {checkpoint.name} was written with {content['batches_per_epoch']} batches per epoch, this "
                f"recipe gives {batches}; use the data and the batch size of the run, or start another"
            )
        self.call_hook("after_load_checkpoint", checkpoint=content)
        load_weights(self.bare_model, content["state_dict"], str(checkpoint.weights_path))
        if content["seed"] != self.seed:
            raise ConfigError(f"resume: the run has seed {content['seed']}, not {self.seed}; leave --seed out")
        self.train_loop._iter = content["step"]  # type: ignore[union-attr]
        self.train_loop._epoch = content["epoch"]  # type: ignore[union-attr]
        changed = restore_optimizer(self.optim_wrapper, content["optimizer"])
        replayed = restore_schedules(
            self._schedulers(), content["param_schedulers"], content["step"], batches, changed=changed
        )
        if replayed and self.rank == 0:
            logger.warning("the learning rate goes on as if the run had begun with the changed settings")
        for name, history in content["message_hub"].items():
            self.message_hub.log_scalars[name] = HistoryBuffer(history["values"], history["counts"])
        for name, hook in self._hooks_with_state().items():
            hook.load_state_dict(content["hooks"].get(name, {}))
        self.logger.info(f"resumed {checkpoint.name}")

    def load_weights_from(self, path: Path) -> Path:
        """Load weights alone, from a file or from a run directory (the best ones); returns the file."""
        if path.is_dir():
            path = best_or_newest(path).weights_path
        content = {"state_dict": read_weights(path)}
        check_weights(self.bare_model, content["state_dict"], str(path))
        self.call_hook("after_load_checkpoint", checkpoint=content)  # the moving average starts from them, too
        load_weights(self.bare_model, content["state_dict"], str(path))
        self._has_loaded = True
        return path

    def load_best(self) -> Path | None:
        """Load the selected weights of this run, the newest intact ones; None, and nothing changes, without any."""
        found, skipped = newest_intact(self.directory, best=True) if self.rank == 0 else (None, [])
        for line in skipped:
            logger.warning("skipped: %s", line)
        name = same_everywhere(None if found is None else found.name)
        return self.load_weights_from(self.directory / f"{name}.safetensors") if name else None

    def _collect(self, step: int, epoch: int) -> dict[str, Any]:
        content: dict[str, Any] = {
            "step": step,
            "epoch": epoch,
            "batches_per_epoch": len(self.train_dataloader),
            "seed": self.seed,
            "state_dict": self._whole_weights(),
            "optimizer": _whole(self.optim_wrapper.state_dict()),  # type: ignore[union-attr]
            "param_schedulers": [scheduler.state_dict() for scheduler in self._schedulers()],
            "message_hub": {
                name: {
                    "values": buffer.data[0][-_KEPT_HISTORY:].tolist(),
                    "counts": buffer.data[1][-_KEPT_HISTORY:].tolist(),
                }
                for name, buffer in self.message_hub.log_scalars.items()
            },
            "hooks": {name: hook.state_dict() for name, hook in self._hooks_with_state().items()},
        }
        metainfo = getattr(self.train_dataloader.dataset, "metainfo", None)
        content["data_info"] = dict(metainfo) if isinstance(metainfo, Mapping) else {}
        self.call_hook("before_save_checkpoint", checkpoint=content)
        return content

    def _whole_weights(self) -> dict[str, Tensor]:
        return {name: full(tensor).detach() for name, tensor in self.bare_model.state_dict().items()}

    def _schedulers(self) -> list[Any]:
        schedulers = self.param_schedulers
        if isinstance(schedulers, dict):
            return [scheduler for group in schedulers.values() for scheduler in group]
        return list(schedulers or [])  # type: ignore[arg-type]

    def _hooks_with_state(self) -> dict[str, Any]:
        return {type(hook).__name__: hook for hook in self.hooks if hasattr(hook, "state_dict")}


@contextlib.contextmanager
def build_runner(plan: Plan) -> Iterator[Runner]:
    """The runner of a plan; its files are closed at the end.

    Raises:
        ConfigError: if the parts do not accept their settings.
    """
    options, directory, name = plan.options, str(plan.directory), plan.directory.name
    settings = {**plan.config, "work_dir": directory, "resume": options.resume, "launcher": options.launcher}
    writers = []
    if options.tensorboard:
        writers.append({"type": "TensorboardVisBackend", "save_dir": str(plan.directory / "tensorboard")})
    if options.wandb:
        about = {"project": plan.package.name, "name": name, "dir": directory}
        writers.append({"type": "WandbVisBackend", "save_dir": directory, "init_kwargs": about})
    if writers:
        settings["visualizer"] = {"type": "Visualizer", "vis_backends": writers, "save_dir": directory}
    with building("model"):
        runner = Runner.from_cfg(settings)
    try:
        yield runner
    finally:
        for hook in runner.hooks:
            if isinstance(hook, MetricsHook | ProgressHook):
                hook.close()
        runner.close()


def silence_console(name: str) -> None:
    """Take the console handlers off an mmengine logger; its file stays."""
    log = MMLogger.get_instance(name)
    for handler in list(log.handlers):
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            log.handlers.remove(handler)


def _whole(value: Any) -> Any:
    """Gather sharded tensors inside nested containers."""
    if isinstance(value, Tensor):
        return full(value)
    if isinstance(value, Mapping):
        return {key: _whole(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_whole(item) for item in value)
    return value
