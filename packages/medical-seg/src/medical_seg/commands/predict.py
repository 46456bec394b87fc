"""``predict``: masks on the grid of the input, in bounded memory, and the pictures of both."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer

from attn_core.engine import TrainedRun
from attn_core.engine.inputs import PredictionTable, find_inputs
from medical_seg.package import PACKAGE

if TYPE_CHECKING:
    from medical_seg.data.folders import Case
    from medical_seg.inference.volume import Network

SLICE = ".dcm"


def predict(
    run: TrainedRun,
    inputs: Sequence[Path],
    out: Path,
    *,
    step: Annotated[float, typer.Option(help="Distance of neighboring windows, as a share of the window.")] = 0.5,
    tta: Annotated[str, typer.Option(help="none, or mirror: average over all flips.")] = "none",
    also: Annotated[
        list[Path] | None, typer.Option(help="Further run, such as another fold (repeatable): logits are averaged.")
    ] = None,
    max_mem: Annotated[
        str | None, typer.Option(help="Most memory to use, such as 4G: large volumes are taken in strips.")
    ] = None,
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="Write <case>_probabilities.npy too: float16, (K, *grid).")
    ] = False,
    keep_largest: Annotated[
        bool, typer.Option("--keep-largest", help="Keep the largest connected part of each class.")
    ] = False,
    overlay: Annotated[bool, typer.Option("--overlay/--no-overlay", help="Write a picture of each case.")] = True,
    geometry_tolerance: Annotated[
        float | None,
        typer.Option(help="mm that the corners of a case's channels may lie apart (default: a tenth of a voxel)."),
    ] = None,
    continue_: Annotated[bool, typer.Option("--continue", help="Skip cases whose mask is there already.")] = False,
) -> Iterator[str]:
    """One mask per case, ``<out>/<case>.nii.gz`` or ``.png``: shape, affine and header of the input.

    A picture that its EXIF turns gets a mask that stands upright. ``predictions.csv`` and ``.json`` list all cases.

    Raises:
        ValueError: an option or an input that cannot be used; more memory needed than allowed.
    """
    from medical_seg.data.volumes import PICTURES, read_volume, suffix
    from medical_seg.inference.budget import Budget, parse_memory
    from medical_seg.inference.largest_parts import largest_parts
    from medical_seg.inference.probabilities import probability_file
    from medical_seg.inference.sliding_window import window_starts
    from medical_seg.inference.volume import segment_volume
    from medical_seg.pictures.planes import draw_planes

    if tta not in ("none", "mirror"):
        raise ValueError(f"--tta: {tta!r} is not one of none, mirror")
    window_starts(1, 1, step)  # a wrong step is refused before anything is read
    budget = None if max_mem is None else Budget(parse_memory(max_mem))
    info = run.data_info
    if "in_channels" in info:
        raise ValueError(f"{run.directory}: a run on slides; use medical-seg slides predict")
    if "spacing" not in info or "window" not in info:
        raise ValueError(f"{run.directory}: its data set says nothing about spacing and window (metainfo)")
    model: Any = run.model
    network = _network(run, also or [])
    cases = find_cases(inputs, None if info.get("pictures") else len(info["channels"]), out)
    with PredictionTable(out) as table:
        for case in cases:
            finished = out / f"{case.name}{'.png' if suffix(case.images[0]) in PICTURES else '.nii.gz'}"
            if continue_ and finished.is_file():
                yield f"{case.name}: kept {finished}"
                continue
            volume = read_volume(case.images, tolerance=geometry_tolerance)
            with probability_file(volume, out / case.name, model, wanted=save_probabilities) as keep:
                mask = segment_volume(
                    model,
                    volume,
                    info,
                    network=network,
                    step=step,
                    mirror=tta == "mirror",
                    budget=budget,
                    keep=keep,
                    device=run.device,
                )
            if keep_largest:
                mask = largest_parts(mask)
            path = volume.write_mask(mask, out / case.name)
            unit = "ml" if volume.orientation is not None else "thousand pixels"
            names = model.written_as(info["classes"])
            counts = sum(np.bincount(plane.ravel(), minlength=256) for plane in mask)  # by planes: it counts in int64
            sizes = [(name, counts[part].sum() * volume.voxel_ml) for name, part in names]  # pyright: ignore[reportIndexIssue]
            what = ", ".join(f"{name} {amount:.1f} {unit}" for name, amount in sizes)
            amounts = {f"{name} [{unit}]": round(float(amount), 3) for name, amount in sizes}
            table.add(case.images[0], case=case.name, mask=str(path), **amounts)
            line = f"{case.name}: {what} → {path}"
            if overlay:
                picture = out / f"{case.name}_overlay.png"
                draw_planes(volume, [("prediction", mask)], model.label_names(info["classes"]), picture, case=case.name)
                line += f", {picture.name}"
            yield line


def find_cases(inputs: Sequence[Path], channels: int | None, out: Path) -> "list[Case]":
    """Cases of files and of folders at any depth; a folder of DICOM slices is one case.

    A case is named by the folders between the inputs' common folder and its files, so that equal names in two folders
    do not meet.

    Args:
        channels: as of `group_cases`.
        out: where results go; they are no inputs.

    Raises: ValueError for a folder without images, a case without all its channels or with more than the network's.
    """
    from medical_seg.data.folders import Case, group_cases
    from medical_seg.data.volumes import SUFFIXES

    found = find_inputs(inputs, (*SUFFIXES, SLICE), what="images", out=out)
    series: dict[Path, Path] = {}
    for item in found:
        if item.path.suffix.lower() == SLICE:
            series.setdefault(item.path.parent, item.stem.parent)
    cases = [
        Case(str(at if at.name else Path(folder.resolve().name)), (folder,), None) for folder, at in series.items()
    ]
    files = [item for item in found if item.path.suffix.lower() != SLICE]
    grouped = group_cases([item.path for item in files], channels, [item.stem.as_posix() for item in files])
    return [*cases, *grouped]


def _network(run: TrainedRun, also: Sequence[Path]) -> "Network":
    """Windows → logits, averaged over runs, as nnU-Net joins its folds."""
    from attn_core.engine.run import open_run

    models: list[Any] = [run.model]
    for path in also:
        other = open_run(PACKAGE, path, device=str(run.device))
        for key in ("channels", "classes", "spacing", "scaling", "window"):
            if other.data_info.get(key) != run.data_info[key]:
                raise ValueError(
                    f"--also: {path} has {key} {other.data_info.get(key)}, {run.directory} has {run.data_info[key]}; "
                    "only runs on one kind of data can be averaged"
                )
        models.append(other.model)
    if len(models) == 1:
        return models[0].tensor
    return lambda image: sum(model.tensor(image) for model in models) / len(models)  # pyright: ignore[reportReturnType]
