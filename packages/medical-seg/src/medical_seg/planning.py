"""From a folder to settings: what the images are like, and the spacing, window and scaling that follow."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from .data.folders import Folder, open_folder, problems, read_case
from .data.volumes import read_volume
from .models import REGISTRY, create_model

WINDOW_VOXELS = 64**3


@dataclass(frozen=True)
class Plan:
    """Settings of a training.

    Attributes:
        spacing: mm along Z, Y, X: the median of all cases. None resizes each case to one window.
        window: voxels along Z, Y, X.
        scaling: a rule per channel, as of `measure_scaling`.
        grid: median grid at that spacing.
        voxels: of each label.
        thick: slices are at least three times as thick as their pixels are wide, or it is pictures; augmentation then
            turns them in their plane only.
    """

    spacing: tuple[float, ...] | None
    window: tuple[int, ...]
    scaling: tuple[Any, ...]
    grid: tuple[int, ...]
    voxels: tuple[int, ...]
    thick: bool


def make_plan(
    folder: Folder,
    network: str,
    options: dict[str, Any],
    window: Sequence[int] | None = None,
    *,
    whole: bool = False,
) -> Plan:
    """Read every case once.

    Args:
        folder: the data.
        network: a name that `create_model` takes; its window must be divisible by what it pools.
        options: of the network.
        window: None chooses the median grid, cut at its longest axis until 64³ voxels are left (256² of a picture).
        whole: resize each case to one window instead of cutting windows from it.

    Raises: ValueError for a case that cannot be used, or a window of the wrong length or divisibility.
    """
    spacings, extents, values = [], [], [[] for _ in folder.channels]
    voxels = np.zeros(folder.labels, dtype=int)
    for case in folder.cases:
        image, label = read_case(folder, case)
        spacings.append(image.spacing)
        extents.append(np.array(image.grid) * image.spacing)
        voxels += np.bincount(label[label < folder.labels].ravel(), minlength=folder.labels)
        inside = label > 0
        for channel, kept in zip(image.data, values, strict=True):
            drawn = channel[inside]
            kept.append(np.random.default_rng(0).choice(drawn, min(len(drawn), 10_000), replace=False))
    spacing = np.median(spacings, axis=0)
    grid = np.maximum(1, np.round(np.median(extents, axis=0) / spacing)).astype(int)
    pictures = grid[0] == 1 or network.startswith(("smp:", "msa", "test_msa"))
    divisor = _divisor(network, options, planar=bool(pictures))
    chosen = _window(grid, divisor, planar=bool(pictures)) if window is None else tuple(window)  # pyright: ignore[reportArgumentType]
    if len(chosen) != 3 or min(chosen) < 1:
        raise ValueError(f"--window: expected three sizes Z Y X such as 32,64,64, got {window}")
    for size in chosen[1:] if chosen[0] == 1 else chosen:
        if size % divisor:
            raise ValueError(f"--window: {network} halves its grid until {divisor} divides it, {size} does not fit")
    rules = []
    for name, kept in zip(folder.channels, values, strict=True):
        if name.upper() != "CT":
            rules.append("zscore")
            continue
        drawn = np.concatenate(kept)
        rules.append(tuple(float(v) for v in (*np.percentile(drawn, (0.5, 99.5)), drawn.mean(), drawn.std())))
    kept = None if whole else tuple(map(float, spacing))
    thick = bool(chosen[0] == 1 or spacing[0] >= 3 * min(spacing[1:]))
    return Plan(kept, chosen, tuple(rules), tuple(map(int, grid)), tuple(map(int, voxels)), thick)


def train_settings(
    *,
    data: Annotated[Path | None, typer.Option("--data", "-d", help="Folder; needs the recipe volumes.")] = None,
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
    epochs: Annotated[int | None, typer.Option(help="Default: the recipe's.")] = None,
) -> list[str]:
    """Settings of the recipe ``volumes`` for a folder, which is checked before anything runs."""
    if data is None:
        if model is not None or fold != "0" or window or whole or option or encoder or epochs:
            raise ValueError(
                "train: --model, --fold, --window, --whole, --option, --encoder and --epochs need --data FOLDER"
            )
        return []
    if not (fold.isdigit() or fold == "all"):
        raise ValueError(f"--fold: expected 0 to 4 or all, got {fold!r}")
    options = _options(option or [])
    if encoder is not None:
        options["encoder_name"] = encoder
    model = model or "agunet"
    folder = open_folder(data)
    sizes = None if window is None else [int(size) if size.strip().isdigit() else 0 for size in window.split(",")]
    if whole and sizes is None:
        raise ValueError("train: --whole needs --window Z,Y,X, the grid that every case is resized to")
    plan = make_plan(folder, model, options, sizes, whole=whole)
    settings: dict[str, Any] = {
        "data": str(data),
        "fold": int(fold) if fold.isdigit() else fold,
        "network": model,
        "options": options,
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
    if epochs is not None:
        settings["epochs"] = epochs
    return [f"{key}={value!r}" if not isinstance(value, str) else f"{key}={value}" for key, value in settings.items()]


def plan(
    data: Annotated[Path, typer.Argument(help="Folder in nnU-Net's layout, or images/ and masks/.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The network that is planned for.")] = "agunet",
) -> Iterator[str]:
    """Check a folder, and print what training would choose for it."""
    folder = open_folder(data)
    found = list(problems(folder))
    yield from found[:-1]
    if found:
        raise ValueError(f"{found[-1]} ({len(found)} of {len(folder.cases)} cases cannot be used)")
    chosen = make_plan(folder, model, {})
    first = read_volume(folder.cases[0].images)
    yield f"cases: {len(folder.cases)}, channels: {', '.join(folder.channels)}"
    names = folder.classes if folder.regions is None else [f"label {k}" for k in range(folder.labels)]
    shares = [f"{name} {n:,}" for name, n in zip(names, chosen.voxels, strict=True)]
    for name, region, label in zip(folder.classes, folder.regions or (), folder.order, strict=bool(folder.regions)):
        yield f"region {name}: labels {', '.join(map(str, region))}, written as {label}"
    yield f"voxels: {', '.join(shares)}" + (f", ignored label {folder.ignore}" if folder.ignore is not None else "")
    unit = "mm" if first.orientation is not None else "pixels"
    yield f"spacing: {' × '.join(f'{s:.3g}' for s in chosen.spacing or ())} {unit}"
    yield f"median grid: {'×'.join(map(str, chosen.grid))} (Z×Y×X), window: {'×'.join(map(str, chosen.window))}"
    rules = [rule if isinstance(rule, str) else f"clip {rule[0]:.4g} to {rule[1]:.4g}" for rule in chosen.scaling]
    yield f"scaling: {', '.join(rules)}"
    yield f"train: medical-seg train volumes -d {data} -m {model} -f 0"


def _window(grid: Sequence[int], divisor: int, *, planar: bool) -> tuple[int, ...]:
    window = [max(divisor, -(-size // divisor) * divisor) for size in grid]
    limit = WINDOW_VOXELS
    if planar:
        window[0], limit = 1, 256**2
    while np.prod(window) > limit and max(window) > divisor:
        window[int(np.argmax(window))] -= divisor
    return tuple(map(int, window))


def _divisor(network: str, options: dict[str, Any], *, planar: bool) -> int:
    if network in REGISTRY:
        with torch.device("meta"):
            given = {} if network.startswith(("msa", "test_msa")) else {"spatial_dims": 2 if planar else 3}
            model: Any = create_model(network, **{**options, **given})
        return int(model.divisor)
    if strides := options.get("strides"):
        return int(np.prod(strides))
    return 32


def _options(given: Sequence[str]) -> dict[str, Any]:
    import ast

    options = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise ValueError(f"--option: expected NAME=VALUE such as filters=(16,32,64), got {text!r}")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value
    return options
