"""``evaluate``: masks against truth, case by case, class by class.

Rules for absent classes, the same everywhere: absent from both → every score is NaN and the case does not count for
the class; absent from one → Dice, IoU and NSD are 0, distances are infinite. Means leave NaN out; means of distances
also leave out infinity and say how many cases that were.

macro: a number per case, then their mean. micro: voxels counted over all cases, then one number.
"""

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from medical_seg.metrics.summary import SMALL_ML, patient, summarize

MOST_LABELS = 255


def evaluate(
    truth: Annotated[Path, typer.Argument(help="Folder of true masks.")],
    predicted: Annotated[Path, typer.Argument(help="Folder of predicted masks, with the same names.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for cases.csv, summary.json, plot.png.")] = Path(
        "evaluation"
    ),
    tolerance: Annotated[float, typer.Option(help="Of the normalized surface distance, in mm.")] = 1.0,
    by_volume: Annotated[float, typer.Option(help="Split patients at this true volume, in ml.")] = SMALL_ML,
    overlap: Annotated[float, typer.Option(help="A patient counts as found above this Dice.")] = 0.0,
    geometry_tolerance: Annotated[
        float | None,
        typer.Option(help="mm that the corners of image and labels may lie apart (default: a tenth of a voxel)."),
    ] = None,
    dataset: Annotated[
        Path | None, typer.Option(help="nnU-Net's folder: its regions are scored, its ignored label does not count.")
    ] = None,
) -> Iterator[str]:
    """Compare two folders of masks: Dice, IoU, HD95, ASSD, NSD, volumes, and how many patients are found."""
    from medical_seg.data.folders import open_folder
    from medical_seg.data.volumes import read_labels, require_same_grid
    from medical_seg.metrics.scores import compare

    for name, value in (("--tolerance", tolerance), ("--by-volume", by_volume), ("--overlap", overlap)):
        if not 0 <= value < float("inf"):
            raise ValueError(f"evaluate: {name} must be 0 or more, got {value}")
    rows: list[dict[str, Any]] = []
    patients: list[dict[str, float]] = []
    pairs = _pairs(truth, predicted)
    folder = None if dataset is None else open_folder(dataset)
    if folder is not None and folder.regions is not None:
        parts = dict(zip(folder.classes, folder.regions, strict=True))
    elif folder is not None:
        parts = {str(k): (k,) for k in range(1, folder.labels)}
    else:
        parts = {str(k): (k,) for k in _labels([path for pair in pairs.values() for path in pair])}
    for name, (true_file, found_file) in pairs.items():
        true, found = read_labels(true_file), read_labels(found_file)
        require_same_grid(true, found, geometry_tolerance)
        counted = np.ones(true.grid, bool)
        if folder is not None and folder.ignore is not None:
            counted = true.data[0] != folder.ignore
        for label, part in parts.items():
            masks = (np.isin(volume.data[0], part) & counted for volume in (found, true))
            scores = compare(*masks, true.spacing, tolerance=tolerance)  # pyright: ignore[reportCallIssue]
            scores["TN"] -= int((~counted).sum())
            rows.append({"case": name, "label": label, **scores})
        joined = (np.isin(volume.data[0], [k for part in parts.values() for k in part]) for volume in (found, true))
        patients.append(patient(*(mask & counted for mask in joined), true.voxel_ml))  # pyright: ignore[reportCallIssue]
    summary = summarize(rows, patients, by_volume=by_volume, overlap=overlap)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "cases.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (out / "summary.json").write_text(json.dumps(_without_nan(summary), indent=1) + "\n")
    _plot(rows, out / "plot.png")
    for label, mean in summary["mean"].items():
        missed = mean["infinite_distances"]
        yield (
            f"label {label}: Dice {mean['Dice']:.4f} (macro, {mean['n']} cases), {mean['Dice_micro']:.4f} (micro), "
            f"HD95 {mean['HD95']:.2f} mm, ASSD {mean['ASSD']:.2f} mm, NSD {mean['NSD']:.4f}"
            + (f"; distances infinite in {missed}" if missed else "")
        )
    for group, table in summary["patients"].items():
        yield (
            f"patients, {group}: {table['n']} true, recall {table['recall']:.3f}, precision {table['precision']:.3f}, "
            f"F1 {table['F1']:.3f}, Dice of the found {table['Dice_found']:.4f}"
        )
    everybody = summary["patients"]["all"]
    if without := everybody["TN"] + everybody["FP"]:
        yield f"{without} of {len(patients)} cases have no foreground; {everybody['TN']} of these were left empty"
    yield f"wrote cases.csv, summary.json, plot.png to {out}"


def _without_nan(value: Any) -> Any:
    """JSON has neither NaN nor infinity: null and a word."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and np.isnan(value):
        return None
    if isinstance(value, float) and np.isinf(value):
        return "infinity"
    return value.item() if isinstance(value, np.generic) else value


def _pairs(truth: Path, predicted: Path) -> dict[str, tuple[Path, Path]]:
    from medical_seg.data.folders import stem

    found = {}
    for folder in (truth, predicted):
        if not folder.is_dir():
            raise ValueError(f"{folder}: there is no such folder")
    theirs = {stem(file): file for file in sorted(predicted.iterdir()) if _is_mask(file)}
    for file in sorted(truth.iterdir()):
        if not _is_mask(file):
            continue
        if stem(file) not in theirs:
            raise ValueError(f"{predicted / file.name}: missing; {file} has no prediction")
        found[stem(file)] = (file, theirs[stem(file)])
    if not found:
        raise ValueError(f"{truth}: holds no masks")
    return found


def _is_mask(file: Path) -> bool:
    from medical_seg.data.volumes import suffix

    return bool(suffix(file)) and not file.name.startswith(".") and not file.name.endswith("_overlay.png")


def _labels(files: Sequence[Path]) -> list[int]:
    """Labels that any mask holds; 1 if all masks are empty."""
    from medical_seg.data.volumes import read_labels

    found = {int(value) for file in files for value in np.unique(read_labels(file).data) if value > 0}
    if len(found) > MOST_LABELS:
        raise ValueError(f"{files[0].parent}: {len(found)} labels are too many; masks hold class numbers 0, 1, 2, …")
    return sorted(found) or [1]


def _plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Dice against the true volume, one color per label."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from attn_core.lettering import lettered

    labels = list(dict.fromkeys(str(row["label"]) for row in rows))
    with lettered(labels) as names:
        figure = Figure(figsize=(6.5, 4), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        for label, name in zip(labels, names, strict=True):
            mine = [row for row in rows if str(row["label"]) == label and row["n_ref"]]
            axis.plot([r["ml_ref"] for r in mine], [r["Dice"] for r in mine], "o", alpha=0.7, label=f"label {name}")
        if any(row["n_ref"] for row in rows):
            axis.set_xscale("log")
        axis.set(xlabel="true volume [ml]", ylabel="Dice", ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
        figure.savefig(path, dpi=120)
