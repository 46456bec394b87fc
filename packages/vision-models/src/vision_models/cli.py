"""The command ``vision-models``: train, eval, predict, export, benchmark, list, info."""

from collections.abc import Mapping
from typing import Any

import torch

from attn_core.engine import ExportTarget, TaskPackage, TrainedRun
from attn_core.engine.cli import run_cli
from attn_core.flops import count_flops

from .bench.families import benchmark
from .models import card, create_model, list_models, timm_name
from .package import PACKAGE
from .predictions import draw_predictions, predict


def info(name: str) -> Mapping[str, object]:
    """Rows of a table about a registered model."""
    with torch.device("meta"):
        model = create_model(name).eval()
    cfg: Any = model.default_cfg
    channels, height, width = cfg["input_size"]
    return {
        "model": name,
        "in timm": timm_name(name),
        "what": card(name).summary,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "multiply-adds": f"{count_flops(lambda: model(torch.empty(1, *cfg['input_size'], device='meta'))) / 2e9:.3f} G",
        "input": f"{channels}×{height}×{width}, any size works",
        "maps": ", ".join(f"{row['num_chs']} channels at 1/{row['reduction']}" for row in model.feature_info),
        "paper": cfg["paper_ids"],
        "official code": f"{cfg['origin_url']} ({cfg['license']})",
        "mean, std": f"{cfg['mean']}, {cfg['std']}",
    }


def export_target(run: TrainedRun | str) -> ExportTarget:
    """The network of a run with inputs of its training size, or a fresh model of a registered name."""
    torch.manual_seed(0)
    if isinstance(run, str):
        model = create_model(run).eval()
        cfg: Any = model.default_cfg
        return ExportTarget(model, (torch.randn(2, *cfg["input_size"]),), run)
    net: Any = run.model.net  # pyright: ignore[reportAttributeAccessIssue]
    options = run.data_info.get("preprocess", {})
    size = options.get("size", (224, 224))
    channels = 1 if options.get("mode") == "L" else 3
    return ExportTarget(net, (torch.randn(2, channels, *size),), run.directory.name)


CLI = TaskPackage(
    package=PACKAGE,
    summary="Attention backbones for vision.",
    list_models=list_models,
    info=info,
    predict=predict,
    export=export_target,
    benchmark=benchmark,
    draw_predictions=draw_predictions,
)


def main() -> None:
    """Entry point of the command."""
    run_cli(CLI)
