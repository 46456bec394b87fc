"""Processes and how a model is spread over them: DDP and FSDP2, on GPUs and on CPUs."""

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from mmengine.dist import get_dist_info
from mmengine.model import MMDistributedDataParallel
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from attn_core.engine.errors import ConfigError

T = TypeVar("T")
STRATEGIES = ("ddp", "fsdp2")
LAUNCHERS = ("none", "pytorch")
TIMEOUT = datetime.timedelta(minutes=30)  # of a collective call: the slowest process may write a checkpoint


def choose_device(name: str = "auto") -> torch.device:
    """The device of this process.

    Args:
        name: ``"auto"`` takes a GPU if there is one; else a torch device name such as ``"cpu"`` or ``"cuda:1"``.

    Raises:
        ConfigError: if the device does not exist.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ConfigError(f"device: {name!r} is not a device; use auto, cpu, cuda or cuda:<n>") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = local_rank if device.index is None else device.index
        if index >= count:
            raise ConfigError(f"device: {name!r} needs GPU {index}, torch sees {count}; use --device cpu")
        return torch.device("cuda", index)
    try:
        torch.zeros(1, device=device).item()
    except Exception:  # each kind of device has its own type of complaint about its absence; "meta" holds no numbers
        raise ConfigError(f"device: there is no {name!r} on this machine; use auto, cpu, cuda or cuda:<n>") from None
    return device


def start_processes(launcher: str, device: torch.device) -> None:
    """Join the process group that ``torchrun`` has prepared; nothing for ``launcher="none"``.

    mmengine's own start is not used: it selects a CUDA device even for gloo.

    Raises:
        ConfigError: if the process was not started by ``torchrun``.
    """
    if launcher not in LAUNCHERS:
        raise ConfigError(f"launcher: {launcher!r} is not one of {', '.join(LAUNCHERS)}")
    if launcher == "none" or distributed.is_initialized():
        return
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        command = Path(sys.argv[0]).name
        raise ConfigError(
            "train: --launcher pytorch needs the variables that torchrun sets; "
            f"run: torchrun --nproc-per-node 2 --no-python {command} train --launcher pytorch"
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )


@contextlib.contextmanager
def processes(launcher: str, device: torch.device) -> Iterator[None]:
    """Join the process group for the length of a run (see `start_processes`).

    After an error the group is left to the end of the process: the others may be waiting in it.
    """
    start_processes(launcher, device)
    yield
    if launcher != "none" and distributed.is_initialized():
        distributed.destroy_process_group()


def rank_and_size() -> tuple[int, int]:
    """Number of this process, and how many there are; (0, 1) without a process group."""
    return get_dist_info()


def is_main() -> bool:
    """Whether this is process 0."""
    return rank_and_size()[0] == 0


def on_main(function: Callable[[], T]) -> T:
    """What ``function`` gives on process 0, on every process; an error there is raised on every process."""
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = function()
        except Exception as error:
            if not distributed.is_initialized():
                raise
            box[1] = error
    if distributed.is_initialized():
        distributed.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]


@contextlib.contextmanager
def only_on_main(context: contextlib.AbstractContextManager[Any]) -> Iterator[None]:
    """Enter a context on process 0 alone; an error of its entry is raised on every process."""
    on_main(lambda: context.__enter__() and None)
    try:
        yield
    except BaseException:
        if not is_main() or not context.__exit__(*sys.exc_info()):
            raise
    else:
        if is_main():
            context.__exit__(None, None, None)


def spread(
    model: nn.Module, device: torch.device, strategy: Mapping[str, Any], *, find_unused_parameters: bool = False
) -> nn.Module:
    """Wrap (DDP) or shard (FSDP2) a model that is equal on all processes and lies on ``device``.

    Args:
        model: The task model.
        device: The device of this process.
        strategy: ``dict(type="ddp")`` or ``dict(type="fsdp2", units=[...])``; ``units`` are the class names of the
            modules whose parameters are gathered together, by default every class whose name ends in ``Block``.
        find_unused_parameters: DDP only: some parameters get no gradient in some steps.
    """
    kind = strategy.get("type", "ddp")
    if kind == "ddp":
        return MMDistributedDataParallel(
            module=model,
            device_ids=[device.index] if device.type == "cuda" else None,
            broadcast_buffers=True,
            find_unused_parameters=find_unused_parameters,
        )
    if kind != "fsdp2":
        raise ConfigError(f"strategy: {kind!r} is not one of {', '.join(STRATEGIES)}")
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for unit in [*_units(model, strategy.get("units")), model]:
        # True for the outermost as well: between steps all parameters must be shards, for hooks and checkpoints.
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    return model


def _units(model: nn.Module, names: Iterable[str] | None) -> list[nn.Module]:
    found = [
        module
        for module in model.modules()
        if (type(module).__name__ in names if names is not None else type(module).__name__.endswith("Block"))
    ]
    if names is not None and not found:
        raise ConfigError(f"strategy.units: no module of class {', '.join(names)} in {type(model).__name__}")
    # fully_shard goes from the inside out
    return found[::-1]


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether the flag is set on at least one process; every process must ask."""
    if not distributed.is_initialized():
        return flag
    count = torch.tensor(float(flag), device=device)
    distributed.all_reduce(count)
    return bool(count > 0)


def mean_over_processes(values: dict[str, float], device: torch.device) -> dict[str, float]:
    """Mean of each value; every process must ask with the same names."""
    if not distributed.is_initialized():
        return values
    tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=device)
    distributed.all_reduce(tensor)
    return dict(zip(values, (tensor / distributed.get_world_size()).tolist(), strict=True))


def same_everywhere(value: Any) -> Any:
    """The value of process 0."""
    if not distributed.is_initialized():
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]
