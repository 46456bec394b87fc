"""The training engine of all packages: mmengine's Runner made fit for today's torch (extra ``attn-core[train]``).

The one module that packages import for training; nothing else imports mmengine. `attn_core.engine.train` is the tour.
Names are imported when they are first used: a command that only prints its help loads no engine.
"""

from typing import TYPE_CHECKING

import attn_core.engine.extras  # noqa: F401  first: it says which extra is missing
from attn_core.deferred import deferred

if TYPE_CHECKING:
    from mmengine.hooks import Hook

    from attn_core.engine.averaging import EMAHook
    from attn_core.engine.distributed import rank_and_size
    from attn_core.engine.errors import CheckpointError, ConfigError, EngineError, NonFiniteLossError, RunInterrupted
    from attn_core.engine.metrics import Accuracy, Metric
    from attn_core.engine.names import build
    from attn_core.engine.optim import ParameterGroups
    from attn_core.engine.package import BenchmarkRequest, ExportTarget, PackageId, TaskPackage, TrainedRun
    from attn_core.engine.recipes import read_base
    from attn_core.engine.schedules import (
        ConstantLR,
        CosineAnnealingLR,
        ExponentialLR,
        LinearLR,
        MultiStepLR,
        PolyLR,
        StepLR,
        warmup,
        warmup_cosine,
    )
    from attn_core.engine.task import ClassificationTask, TaskModel

__all__ = [
    "Accuracy",
    "BenchmarkRequest",
    "CheckpointError",
    "ClassificationTask",
    "ConfigError",
    "ConstantLR",
    "CosineAnnealingLR",
    "EMAHook",
    "EngineError",
    "ExponentialLR",
    "ExportTarget",
    "Hook",
    "LinearLR",
    "Metric",
    "MultiStepLR",
    "NonFiniteLossError",
    "PackageId",
    "ParameterGroups",
    "PolyLR",
    "RunInterrupted",
    "StepLR",
    "TaskModel",
    "TaskPackage",
    "TrainedRun",
    "build",
    "rank_and_size",
    "read_base",
    "warmup",
    "warmup_cosine",
]

_ERRORS = ("CheckpointError", "ConfigError", "EngineError", "NonFiniteLossError", "RunInterrupted")
_SCHEDULES = ("ConstantLR", "CosineAnnealingLR", "ExponentialLR", "LinearLR", "MultiStepLR", "PolyLR", "StepLR")
__getattr__, __dir__ = deferred(
    __name__,
    {
        "mmengine.hooks": ("Hook",),
        "attn_core.engine.averaging": ("EMAHook",),
        "attn_core.engine.distributed": ("rank_and_size",),
        "attn_core.engine.errors": _ERRORS,
        "attn_core.engine.metrics": ("Accuracy", "Metric"),
        "attn_core.engine.names": ("build",),
        "attn_core.engine.optim": ("ParameterGroups",),
        "attn_core.engine.package": ("BenchmarkRequest", "ExportTarget", "PackageId", "TaskPackage", "TrainedRun"),
        "attn_core.engine.recipes": ("read_base",),
        "attn_core.engine.schedules": (*_SCHEDULES, "warmup", "warmup_cosine"),
        "attn_core.engine.task": ("ClassificationTask", "TaskModel"),
    },
)
