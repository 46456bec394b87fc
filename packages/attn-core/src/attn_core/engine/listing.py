"""The models of ``list``: what each costs and what its authors report."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from attn_core.engine.package import TaskPackage

_COLUMNS = ("parameters", "multiply-adds", "published")


def model_rows(task: TaskPackage, *, counted: bool = False) -> list[dict[str, str]]:
    """One row for each model of a package, the small siblings for tests (``test_*``) left out.

    Columns are those of ``info`` that compare models, where at least one model has them. Models are made on the meta
    device, where that is possible: nothing is initialized and nothing computed.

    Args:
        task: The verbs of the package.
        counted: Also what ``info`` computes only when it is shown, such as multiply-adds: about a second for a model.
    """
    names = [name for name in (task.list_models() if task.list_models else ()) if not name.startswith("test_")]
    about = {name: _about(task, name, counted=counted) for name in names}
    columns = [column for column in _COLUMNS if any(about[name].get(column) for name in names)]
    return [{"model": name, **{column: about[name].get(column, "") for column in columns}} for name in names]


def shown(value: object) -> str:
    """A value of ``info`` as text; a function is called for it."""
    return str(value() if callable(value) else value)


def _about(task: TaskPackage, name: str, *, counted: bool) -> dict[str, str]:
    if task.info is None:
        return {}
    try:
        with torch.device("meta"), _Uninitialized():
            rows = task.info(name)
    except (RuntimeError, NotImplementedError):  # its constructor computes with what it initializes
        rows = task.info(name)
    return {key: shown(value) for key, value in rows.items() if counted or not callable(value)}


class _Uninitialized(TorchFunctionMode):
    """Leaves out what changes a tensor without data: torch works out random numbers for it in Python."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = getattr(func, "__name__", "")
        changes = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
        if changes and args and isinstance(args[0], Tensor) and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))
