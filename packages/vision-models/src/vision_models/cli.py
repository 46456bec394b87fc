"""The command ``vision-models``: train, eval, predict, export, benchmark, list, info."""

import functools
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from attn_core.engine import ExportTarget, TaskPackage, TrainedRun
from attn_core.engine.cli import run_cli

from .bench.biformer import benchmark
from .models import create_model, list_models
from .predictions import CENTER, draw_predictions, predict


def info(name: str) -> Mapping[str, object]:
    """Rows of a table about a registered model."""
    model = create_model(name)
    cfg: Any = model.default_cfg
    channels, height, width = cfg["input_size"]
    return {
        "model": name,
        "what": _first_line(name),
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "input": f"{channels}×{height}×{width}, any size works",
        "maps": ", ".join(f"{row['num_chs']} channels at 1/{row['reduction']}" for row in model.feature_info),
        "paper": cfg["paper_ids"],
        "official code": f"{cfg['origin_url']} ({cfg['license']})",
        "mean, std": f"{cfg['mean']}, {cfg['std']}",
    }


def _first_line(name: str) -> str:
    from . import biformer

    return (getattr(biformer, name).__doc__ or "").split("\n", 1)[0]


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


PACKAGE = TaskPackage(
    name="vision-models",
    module="vision_models",
    default_recipe="biformer_digits",
    summary=(
        "Attention backbones for vision. predict also takes --region Y,X (fractions of height and width, 0.5,0.5 by "
        "default): the point whose region the routing picture follows; benchmark also takes --compile."
    ),
    list_models=list_models,
    info=info,
    predict=predict,
    export=export_target,
    benchmark=benchmark,
    draw_predictions=draw_predictions,
)


def main() -> None:
    """Entry point; ``--region`` and ``--compile`` are ours alone, so they are taken out before the shared command."""
    arguments = sys.argv[1:]
    package = PACKAGE
    if arguments[:1] == ["predict"]:
        arguments, text = _take_option(arguments, "--region")
        point = CENTER if text is None else _point(text)
        package = replace(package, predict=functools.partial(predict, point=point))
    if arguments[:1] == ["benchmark"] and "--compile" in arguments:
        arguments.remove("--compile")
        package = replace(package, benchmark=functools.partial(benchmark, compiled=True))
    run_cli(package, arguments)


def _take_option(arguments: list[str], option: str) -> tuple[list[str], str | None]:
    for i, argument in enumerate(arguments):
        if argument == option:
            if i + 1 == len(arguments):
                _refuse(f"{option} needs a value such as 0.5,0.5")
            return arguments[:i] + arguments[i + 2 :], arguments[i + 1]
        if argument.startswith(f"{option}="):
            return arguments[:i] + arguments[i + 1 :], argument.partition("=")[2]
    return arguments, None


def _point(text: str) -> tuple[float, float]:
    try:
        y, x = (float(part) for part in text.split(","))
    except ValueError:
        y = x = -1.0
    if not (0 <= y <= 1 and 0 <= x <= 1):
        _refuse(f"--region must be two fractions of height and width such as 0.5,0.5, got {text!r}")
    return y, x


def _refuse(message: str) -> None:
    print(f"vision-models predict: {message}", file=sys.stderr)
    sys.exit(2)
