"""``detection export``: what is written of a detector."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from attn_core.engine import ExportTarget, TrainedRun
from detection.models import create_model

if TYPE_CHECKING:
    from detection.models.plain_detr.detector import PlainDETR


class RawOutputs(nn.Module):
    """What is exported of a `PlainDETR`: pictures (B, 3, Y, X) in [0, 1] → logits (B, Q, K) and cxcywh boxes."""

    def __init__(self, net: "PlainDETR") -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 3, Y, X) → class logits (B, N, K) and boxes (B, N, 4) of the last decoder layer."""
        last = self.net.outputs(images)["layers"][-1]
        return last["pred_logits"], last["pred_boxes"]


def export_target(run: TrainedRun | str) -> ExportTarget:
    """The detector of a run, or a fresh model of a registered name, with a batch of two pictures.

    Raises: ValueError for a run of another detector than Plain-DETR.
    """
    from detection.models.plain_detr.detector import PlainDETR

    torch.manual_seed(0)
    if isinstance(run, str):
        net, name = create_model(run), run
    else:
        net, name = getattr(run.model, "net", run.model), run.directory.name
    if not isinstance(net, PlainDETR):
        raise ValueError(f"export: {name} is a {type(net).__name__}; only Plain-DETR can be exported")
    side = 128 if isinstance(run, TrainedRun) else 256
    images = torch.rand(2, 3, side, side)
    return ExportTarget(RawOutputs(net.eval()), (images,), name, ("images",), ("logits", "boxes"))
