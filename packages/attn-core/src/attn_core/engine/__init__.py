"""The training engine of all packages: mmengine's Runner made fit for today's torch (extra ``attn-core[train]``).

The one module that packages import for training; nothing else imports mmengine. `attn_core.engine.train` is the tour.
"""

import attn_core.engine.extras  # noqa: F401  first: it says which extra is missing

# isort: split
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
