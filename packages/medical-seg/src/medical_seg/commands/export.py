"""``export``: what is written for other runtimes."""

from typing import Any

import torch

from attn_core.engine import ExportTarget, TrainedRun
from medical_seg.models import create_model, is_planar


def export_target(run: TrainedRun | str) -> ExportTarget:
    """The network of a run with windows of its training size, or a fresh model of a registered name."""
    torch.manual_seed(0)
    if isinstance(run, str):
        model: Any = create_model(run).eval()
        side = 2 * model.divisor
        dims = 2 if is_planar(run) else 3
        return ExportTarget(model, (torch.randn(2, model.in_channels, *(side,) * dims),), run)
    task: Any = run.model
    window = task.window[1:] if task.planar else task.window
    channels = len(run.data_info["channels"])
    return ExportTarget(task.net, (torch.randn(2, channels, *window),), run.directory.name)
