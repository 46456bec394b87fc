"""The models of ``list``: what each costs and what its authors report."""

import torch

from attn_core.engine.package import TaskPackage

_COLUMNS = ("parameters", "multiply-adds", "published")


def model_rows(task: TaskPackage) -> list[dict[str, str]]:
    """One row for each model of a package, the small siblings for tests (``test_*``) left out.

    Columns are those of ``info`` that compare models, where at least one model has them. Models are made on the meta
    device, where that is possible: nothing is initialized and nothing computed.
    """
    names = [name for name in (task.list_models() if task.list_models else ()) if not name.startswith("test_")]
    about = {name: _about(task, name) for name in names}
    columns = [column for column in _COLUMNS if any(about[name].get(column) for name in names)]
    return [{"model": name, **{column: about[name].get(column, "") for column in columns}} for name in names]


def _about(task: TaskPackage, name: str) -> dict[str, str]:
    if task.info is None:
        return {}
    try:
        with torch.device("meta"):
            rows = task.info(name)
    except (RuntimeError, NotImplementedError):  # its constructor computes with what it initializes
        rows = task.info(name)
    return {key: str(value) for key, value in rows.items()}
