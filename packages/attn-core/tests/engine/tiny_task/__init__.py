"""A task package as small as possible: two classes of noisy points, a network with dropout, augmentation."""

import errno
import importlib
import random
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn

from attn_core.engine import ExportTarget, PackageId, TaskPackage, TrainedRun


class Points:
    """Points of two classes in the plane, with noise from every global generator added at each access."""

    metainfo = {"classes": ["left", "right"]}  # noqa: RUF012

    def __init__(self, split: str, size: int = 48, noise: float = 0.1, bad: int | None = None) -> None:
        if size == 1:
            raise ValueError("Points: one point is not a data set")
        seed = {"train": 1, "val": 2, "test": 3}[split]
        generator = torch.Generator().manual_seed(seed)
        self.label = torch.arange(size) % 2
        self.point = torch.randn(size, 4, generator=generator) + 1.5 * self.label[:, None]
        self.noise = noise
        if bad is not None:
            self.point[bad] = float("nan")

    def __len__(self) -> int:
        return len(self.label)

    def __getitem__(self, index: int) -> dict[str, object]:
        shift = random.random() + np.random.rand() + float(torch.rand(()))  # noqa: NPY002
        return {"image": self.point[index] + self.noise * shift, "label": int(self.label[index])}


class Net(nn.Module):
    """Two layers with dropout."""

    def __init__(self, width: int = 8, dropout: float = 0.2) -> None:
        super().__init__()
        self.first = nn.Linear(4, width)
        self.block = HiddenBlock(width, dropout)
        self.last = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.block(self.first(x)))


class HiddenBlock(nn.Module):
    """A residual layer: a unit that FSDP2 shards by itself."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(torch.relu(self.linear(x)))


def _info(name: str) -> dict[str, object]:
    net = Net(80 if name == "wide_net" else 8)
    first = float(net.first.weight[0, 0]) if name == "wide_net" else 0.0  # fails on the meta device
    published = {"published": "90 %"} if first else {}
    counted = {"multiply-adds": lambda: "56"} if name == "net" else {}
    return {"name": name, "parameters": sum(p.numel() for p in net.parameters()), **counted, **published}


def _export(source: TrainedRun | str) -> ExportTarget:
    net = Net() if isinstance(source, str) else source.model.get_submodule("net")
    return ExportTarget(net, (torch.randn(2, 4),), "tiny")


def _predict(run: TrainedRun, inputs, out, *, loud: Annotated[bool, typer.Option(help="In capitals.")] = False):  # noqa: ARG001  the command passes it by name
    for path in inputs:
        if path.stat().st_size == 0:
            raise ValueError(f"{path} is empty")
        line = f"{path.name}: {run.data_info['classes'][0]}"
        yield line.upper() if loud else line


def _train_settings(*, width: Annotated[int | None, typer.Option(help="Width of the network.")] = None):
    return [] if width is None else [f"model.net.width={width}"]


def _greet(
    who: Annotated[str, typer.Argument(help="Whom.")],
    times: Annotated[int, typer.Option(help="How often.")] = 1,
):
    """Say hello."""
    if times < 1:
        raise ValueError(f"--times must be positive, got {times}")
    for _ in range(times):
        yield f"hello {who}"


PACKAGE = PackageId(name="tiny", module="tiny_task", default_recipe="points")


def _fail(kind: Annotated[str, typer.Argument(help="Name of an exception.")]):
    """Raise an exception that nobody foresaw."""
    yield "begun"
    if kind == "library":
        np.reshape(np.zeros(3), (2, 2))
    if kind == "module":
        importlib.import_module("no_such_package.part")
    if kind == "pipe":
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")  # as the system raises it; typer makes SystemExit of it
    raise {
        "KeyError": KeyError,
        "RuntimeError": RuntimeError,
        "MemoryError": MemoryError,
        "BrokenPipeError": BrokenPipeError,
        "RecursionError": RecursionError,
        "OSError": OSError,
    }[kind]("first line\nsecond line")


def draw_predictions(_model: nn.Module, _loader, path: Path) -> None:
    """Any file."""
    path.write_bytes(b"picture")


CLI = TaskPackage(
    package=PACKAGE,
    summary="A task for tests.",
    list_models=lambda: ["net", "test_net", "wide_net"],
    info=_info,
    export=_export,
    predict=_predict,
    benchmark=lambda _: [{"model": "net", "ms": 1.0}],
    draw_predictions=draw_predictions,
    train_settings=_train_settings,
    commands={"greet": _greet, "fail": _fail},
    groups={
        "inner": TaskPackage(
            package=PACKAGE, train_settings=_train_settings, commands={"greet": _greet}, verbs=("eval",)
        )
    },
)
