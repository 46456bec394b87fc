"""The training engine of all packages: mmengine's Runner made fit for today's torch (extra ``attn-core[train]``)."""

import attn_core.engine.extras  # noqa: F401  # isort: skip  # first: it says which extra is missing
from attn_core.engine.averaging import EMAHook
from attn_core.engine.errors import CheckpointError, ConfigError, EngineError, NonFiniteLossError, RunInterrupted
from attn_core.engine.metrics import Accuracy
from attn_core.engine.package import BenchmarkRequest, ExportTarget, PackageId, TaskPackage, TrainedRun
from attn_core.engine.task import ClassificationTask, TaskModel

__all__ = [
    "Accuracy",
    "BenchmarkRequest",
    "CheckpointError",
    "ClassificationTask",
    "ConfigError",
    "EMAHook",
    "EngineError",
    "ExportTarget",
    "NonFiniteLossError",
    "PackageId",
    "RunInterrupted",
    "TaskModel",
    "TaskPackage",
    "TrainedRun",
]
