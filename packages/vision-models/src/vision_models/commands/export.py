"""The verb ``export``: what of a run, or of a registered model, is written as ONNX or for ``torch.export``."""

from typing import Any

import torch

from attn_core.engine import ExportTarget, TrainedRun
from vision_models.data.images import preparation
from vision_models.models import create_model


def export_target(run: TrainedRun | str) -> ExportTarget:
    """The network of a run with inputs of its training size, or a fresh model of a registered name."""
    torch.manual_seed(0)
    if isinstance(run, str):
        model = create_model(run).eval()
        cfg: Any = model.default_cfg
        return ExportTarget(model, (torch.randn(2, *cfg["input_size"]),), run)
    net: Any = run.model.net  # pyright: ignore[reportAttributeAccessIssue]
    size = preparation(run.data_info, run.directory)[0].size
    return ExportTarget(net, (torch.randn(2, net.in_chans, *size),), run.directory.name)
