"""``plan``: check a folder, and print what training would choose for it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer


def plan(
    data: Annotated[Path, typer.Argument(help="Folder in nnU-Net's layout, or images/ and masks/.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The network that is planned for.")] = "agunet",
    geometry_tolerance: Annotated[
        float | None,
        typer.Option(help="mm that the corners of image and labels may lie apart (default: a tenth of a voxel)."),
    ] = None,
) -> Iterator[str]:
    """Check a folder, and print what training would choose for it."""
    from medical_seg.data.folders import open_folder, problems
    from medical_seg.data.planning import healthy, make_plan
    from medical_seg.data.volumes import read_volume
    from medical_seg.models import is_planar, window_divisor

    folder = open_folder(data, tolerance=geometry_tolerance)
    found = list(problems(folder))
    yield from found[:-1]
    if found:
        raise ValueError(f"{found[-1]} ({len(found)} of {len(folder.cases)} cases cannot be used)")
    chosen = make_plan(folder, lambda planar: window_divisor(model, {}, planar=planar), planar=is_planar(model))
    first = read_volume(folder.cases[0].images)
    yield f"cases: {len(folder.cases)}{healthy(chosen.empty)}; channels: {', '.join(folder.channels)}"
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
