"""The command ``medical-seg``: train, eval, predict, export, benchmark, list, info and its own verbs."""

from collections.abc import Mapping
from typing import Any

import torch

from attn_core.engine import ExportTarget, TaskPackage, TrainedRun
from attn_core.engine.cli import run_cli

from .bench.networks import benchmark
from .convert_weights import convert_weights
from .demo import demo
from .evaluation import evaluate
from .models import card, create_model, list_models
from .package import PACKAGE
from .planning import plan, train_settings
from .predictions import draw_predictions, predict


def info(name: str) -> Mapping[str, object]:
    """Rows of a table about a registered model."""
    about = card(name)
    with torch.device("meta"):
        model: Any = create_model(name)
    return {
        "model": name,
        "what": about.summary,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "input": f"{model.in_channels} channel, every axis divisible by {model.divisor}",
        "output": f"logits of {model.out_channels} classes on the same grid",
        "paper": f"arXiv {about.paper}",
        "official code": f"{about.code} ({about.license or 'no license'})",
        **({"published": about.published} if about.published else {}),
    }


def export_target(run: TrainedRun | str) -> ExportTarget:
    """The network of a run with windows of its training size, or a fresh model of a registered name."""
    torch.manual_seed(0)
    if isinstance(run, str):
        model: Any = create_model(run).eval()
        side = 2 * model.divisor
        dims = 2 if card(run).family == "MSA" else 3
        return ExportTarget(model, (torch.randn(2, model.in_channels, *(side,) * dims),), run)
    task: Any = run.model
    window = task.window[1:] if task.planar else task.window
    channels = len(run.data_info["channels"])
    return ExportTarget(task.net, (torch.randn(2, channels, *window),), run.directory.name)


CLI = TaskPackage(
    package=PACKAGE,
    summary="Attention networks for medical image segmentation: from a folder of volumes or pictures to masks.",
    list_models=list_models,
    info=info,
    predict=predict,
    export=export_target,
    benchmark=benchmark,
    draw_predictions=draw_predictions,
    train_settings=train_settings,
    commands={"evaluate": evaluate, "plan": plan, "demo": demo, "convert-weights": convert_weights},
)


def main() -> None:
    """Entry point of the command."""
    run_cli(CLI)
