"""Options of ``train`` for a folder of one's own, and what is drawn at the end of a run."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn

from medical_seg.commands.options import named_values


def train_settings(
    *,
    data: Annotated[
        Path | None, typer.Option("--data", "-d", help="Your folder; without a name the recipe is volumes.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="agunet (default), daunet, msa, monai:UNet, smp:Unet …")
    ] = None,
    fold: Annotated[str, typer.Option("--fold", "-f", help="0 to 4, or all.")] = "0",
    window: Annotated[str | None, typer.Option(help="Z,Y,X in voxels (default: planned).")] = None,
    whole: Annotated[
        bool, typer.Option("--whole", help="Resize each case to one window, as AGUNet's authors do.")
    ] = False,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Constructor argument of the network (repeatable).")
    ] = None,
    encoder: Annotated[str | None, typer.Option(help="Of smp: networks, e.g. resnet34 or biformer_tiny.")] = None,
    geometry_tolerance: Annotated[
        float | None,
        typer.Option(help="mm that the corners of image and labels may lie apart (default: a tenth of a voxel)."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Default: the recipe's.")] = None,
) -> list[str]:
    """Settings of the recipe ``volumes`` for a folder, which is checked before anything runs."""
    from medical_seg.data.folders import open_folder
    from medical_seg.data.planning import healthy, make_plan
    from medical_seg.models import is_planar, window_divisor

    if data is None:
        given = (model, window, option, encoder, epochs, geometry_tolerance)
        if whole or fold != "0" or any(value is not None for value in given):
            raise ValueError(
                "train: --model, --fold, --window, --whole, --option, --encoder, --geometry-tolerance and --epochs "
                "need --data FOLDER"
            )
        return []
    if not (re.fullmatch(r"[0-9]{1,4}", fold) or fold == "all"):
        raise ValueError(f"--fold: expected 0 to 4 or all, got {fold!r}")
    options = named_values(option or [])
    if encoder is not None:
        options["encoder_name"] = encoder
    planned_for = model or "agunet"  # what suits it suits the smaller ones
    folder = open_folder(data, tolerance=geometry_tolerance)
    sizes = (
        None
        if window is None
        else [int(size) if re.fullmatch(r" *[0-9]{1,5} *", size) else 0 for size in window.split(",")]
    )
    if whole and sizes is None:
        raise ValueError("train: --whole needs --window Z,Y,X, the grid that every case is resized to")
    plan = make_plan(
        folder,
        lambda planar: window_divisor(planned_for, options, planar=planar),
        sizes,
        planar=is_planar(planned_for),
        whole=whole,
    )
    settings: dict[str, Any] = {
        "data": str(data),
        "fold": fold if fold == "all" else int(fold),
        "in_channels": len(folder.channels),
        "classes": list(folder.classes if folder.regions else folder.classes[1:]),
        "out_channels": len(folder.classes),
        "window": plan.window,
        "spacing": plan.spacing,
        "scaling": list(plan.scaling),
        "ignore": folder.ignore,
        "thick": plan.thick,
        "regions": folder.regions,
        "order": folder.order,
    }
    if model is not None:
        settings["network"] = model
    if options:
        settings["options"] = options
    if geometry_tolerance is not None:
        settings["geometry_tolerance"] = geometry_tolerance
    if epochs is not None:
        settings["epochs"] = epochs
    typer.echo(f"{data}: {len(folder.cases)} cases{healthy(plan.empty)}")
    return [f"{key}={value!r}" if not isinstance(value, str) else f"{key}={value}" for key, value in settings.items()]


def draw_predictions(model: nn.Module, loader: Iterable[dict[str, Any]], path: Path) -> None:
    """Three planes of the first test case, or of slides their figures and heat maps."""
    from medical_seg.slides.task import SlideTask

    if isinstance(model, SlideTask):
        from medical_seg.slides.end_of_run import draw_predictions
    else:
        from medical_seg.pictures.end_of_run import draw_predictions

    draw_predictions(model, loader, path)
