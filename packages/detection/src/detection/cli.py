"""The command ``detection``: train, eval, predict, export, benchmark, list, info."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from attn_core.engine import ExportTarget, TaskPackage, TrainedRun
from attn_core.engine.cli import run_cli

from .benchmark import benchmark
from .models import card, create_model, list_models
from .package import PACKAGE
from .plain_detr import PlainDETR
from .predictions import draw_predictions, predict
from .ring3d_picture import write_samples


class RawOutputs(nn.Module):
    """What is exported of a `PlainDETR`: pictures (B, 3, Y, X) in [0, 1] → logits (B, Q, K) and cxcywh boxes."""

    def __init__(self, net: PlainDETR) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        last = self.net.outputs(images)["layers"][-1]
        return last["pred_logits"], last["pred_boxes"]


def info(name: str) -> Mapping[str, object]:
    """Rows of a table about a registered model."""
    model, about = create_model(name), card(name)
    return {
        "model": name,
        "what": about.summary,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "paper": f"arXiv {about.paper}",
        "official code": f"{about.code} ({about.license})",
        "published": about.published or "nothing for this variant",
    }


def export_target(run: TrainedRun | str) -> ExportTarget:
    """The detector of a run, or a fresh model of a registered name, with a batch of two pictures.

    Raises: ValueError for a run of another detector than Plain-DETR.
    """
    torch.manual_seed(0)
    if isinstance(run, str):
        net, name = create_model(run), run
    else:
        net, name = getattr(run.model, "net", run.model), run.directory.name
    if not isinstance(net, PlainDETR):
        raise ValueError(f"export: {name} is a {type(net).__name__}; only Plain-DETR can be exported")
    side = 128 if isinstance(run, TrainedRun) else 256
    return ExportTarget(RawOutputs(net.eval()), (torch.rand(2, 3, side, side),), name)


CLI = TaskPackage(
    package=PACKAGE,
    summary="Attention detectors: Plain-DETR, DFA3D, BVR.",
    list_models=list_models,
    info=info,
    predict=predict,
    export=export_target,
    benchmark=benchmark,
    draw_predictions=draw_predictions,
    commands={"ring3d": write_samples},
)


def main() -> None:
    """Entry point of the command."""
    run_cli(CLI)
