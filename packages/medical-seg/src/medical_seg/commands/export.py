"""``export``: what is written for other runtimes."""

from typing import Any

import torch
from torch import Tensor, nn

from attn_core.engine import ExportTarget, TrainedRun
from medical_seg.models import create_model, is_planar
from medical_seg.models.acmil import BagNetwork


def export_target(run: TrainedRun | str) -> ExportTarget:
    """The network of a run with windows of its training size, or a fresh model of a registered name."""
    torch.manual_seed(0)
    if isinstance(run, str):
        model: Any = create_model(run).eval()
        if isinstance(model, BagNetwork):
            return _bags(model, run)
        side = 2 * model.divisor
        dims = 2 if is_planar(run) else 3
        return ExportTarget(model, (torch.randn(2, model.in_channels, *(side,) * dims),), run)
    task: Any = run.model
    if isinstance(task.net, BagNetwork):
        return _bags(task.net, run.directory.name)
    window = task.window[1:] if task.planar else task.window
    channels = len(run.data_info["channels"])
    return ExportTarget(task.net, (torch.randn(2, channels, *window),), run.directory.name)


def _bags(network: BagNetwork, name: str) -> ExportTarget:
    return ExportTarget(
        _Plain(network),
        (torch.randn(2, 40, network.in_channels),),
        name,
        output_names=("logits", "branches", "attention"),
        axes=({0: "batch", 1: "instances"},),
        others=((torch.randn(1, 7, network.in_channels),),),
    )


class _Plain(nn.Module):
    """A network whose outputs are a tuple without names: torch.export writes no others."""

    def __init__(self, network: BagNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        """Logits, branches, attention."""
        return tuple(self.network(features))
