"""``slides heatmap``: where a network looked, as pictures and for QuPath."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from medical_seg.package import PACKAGE


def heatmap(
    inputs: Annotated[
        list[Path], typer.Argument(help="Features with coordinates: files or folders.", metavar="INPUT...")
    ],
    run: Annotated[str | None, typer.Option(help="Run directory (default: the newest under runs).")] = None,
    out: Annotated[Path, typer.Option("--out", help="Where files are written.")] = Path("heatmaps"),
    slide: Annotated[list[str] | None, typer.Option(help="Only the slide of this name (repeatable).")] = None,
    thumbnails: Annotated[
        Path | None, typer.Option(help="Folder of pictures named as the slides are, or one picture.")
    ] = None,
    downsample: Annotated[
        float | None,
        typer.Option(help="Pixels of the largest level to one of the thumbnail (default: the file's word)."),
    ] = None,
    patch: Annotated[
        float | None, typer.Option(help="Side of a patch in pixels of the largest level (default: the file's word).")
    ] = None,
    scale: Annotated[str, typer.Option(help="Colors by rank, or linear in attention.")] = "rank",
    top: Annotated[int | None, typer.Option(help="Only so many tiles in the GeoJSON.", min=1)] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:<n>.")] = "auto",
) -> Iterator[str]:
    """Draw where a trained network looked: <slide>.png, <slide>.geojson for QuPath, <slide>.npz of all branches."""
    from attn_core.engine.run import open_run
    from medical_seg.models.acmil import AttentionNetwork
    from medical_seg.slides.folder import find_slides
    from medical_seg.slides.heatmap import draw_heatmap, side_of_patches, write_tiles
    from medical_seg.slides.reading import read_slide, task_of

    if scale not in ("rank", "linear"):
        raise ValueError(f"--scale: {scale!r} is not one of rank, linear")
    for name, value in (("--downsample", downsample), ("--patch", patch)):
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} must be positive, got {value:g}")
    trained = open_run(PACKAGE, run, device=device)
    task = task_of(trained)
    found = find_slides(inputs, out)
    if missing := set(slide or ()) - {one.name for one in found}:
        raise ValueError(f"--slide: there is no slide {sorted(missing)[0]!r} among {len(found)}")
    label = "attention" if isinstance(task.net, AttentionNetwork) else "probability alone"
    out.mkdir(parents=True, exist_ok=True)
    for one in found:
        if slide and one.name not in slide:
            continue
        places = one.coordinates()
        if places is None:
            raise ValueError(f"{one.path}: slide {one.name!r} has no coordinates, so that nothing can be drawn")
        reading = read_slide(task, one, trained.device)
        side = patch or side_of_patches(places, one.side)
        values = reading.importance.double().numpy()
        best = int(reading.scores.argmax())
        picture = _thumbnail_of(thumbnails, one.name)
        factor = downsample
        if picture is not None and factor is None and one.extent is not None:
            factor = one.extent[0] / _width(picture)
        draw_heatmap(
            out / f"{one.name}.png",
            places,
            side,
            values,
            title=f"{one.name}: {trained.data_info['classes'][best]} ({100 * float(reading.scores[best]):.1f} %)",
            label=label,
            scale="rank" if scale == "rank" else "linear",
            thumbnail=picture,
            downsample=factor,
        )
        count = write_tiles(out / f"{one.name}.geojson", places, side, values, label=label, most=top)
        np.savez(out / f"{one.name}.npz", coords=places, importance=values, attention=reading.attention.numpy())
        yield f"{one.name}: {count} tiles → {out / one.name}.png, .geojson, .npz"


def _thumbnail_of(place: Path | None, name: str) -> Path | None:
    if place is None or place.is_file():
        return place
    if not place.is_dir():
        raise ValueError(f"--thumbnails: {place} does not exist")
    from attn_core.pictures import is_picture

    found = sorted(file for file in place.iterdir() if file.stem == name and is_picture(file))
    if not found:
        raise ValueError(f"--thumbnails: {place} holds no picture of slide {name!r}")
    return found[0]


def _width(picture: Path) -> int:
    from attn_core.pictures import read_picture

    shape: Any = read_picture(picture).levels.shape
    return int(shape[1])
