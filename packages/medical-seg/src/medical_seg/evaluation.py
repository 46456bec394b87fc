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
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import ndimage

from .data.folders import open_folder
from .data.volumes import read_volume, require_same_grid, suffix

SMALL_ML = 3.0
OVERLAPS = ("Dice", "IoU")
DISTANCES = ("HD95", "ASSD")


def evaluate(
    truth: Annotated[Path, typer.Argument(help="Folder of true masks.")],
    predicted: Annotated[Path, typer.Argument(help="Folder of predicted masks, with the same names.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for cases.csv, summary.json, plot.png.")] = Path(
        "evaluation"
    ),
    tolerance: Annotated[float, typer.Option(help="Of the normalized surface distance, in mm.")] = 1.0,
    by_volume: Annotated[float, typer.Option(help="Split patients at this true volume, in ml.")] = SMALL_ML,
    overlap: Annotated[float, typer.Option(help="A patient counts as found above this Dice.")] = 0.0,
    dataset: Annotated[
        Path | None, typer.Option(help="nnU-Net's folder: its regions are scored, its ignored label does not count.")
    ] = None,
) -> Iterator[str]:
    """Compare two folders of masks: Dice, IoU, HD95, ASSD, NSD, volumes, and how many patients are found."""
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
        true, found = read_volume([true_file]), read_volume([found_file])
        require_same_grid(true, found)
        counted = np.ones(true.grid, bool)
        if folder is not None and folder.ignore is not None:
            counted = true.data[0] != folder.ignore
        for label, part in parts.items():
            masks = (np.isin(volume.data[0], part) & counted for volume in (found, true))
            scores = compare(*masks, true.spacing, tolerance=tolerance)  # pyright: ignore[reportCallIssue]
            scores["TN"] -= int((~counted).sum())
            rows.append({"case": name, "label": label, **scores})
        joined = (np.isin(volume.data[0], [k for part in parts.values() for k in part]) for volume in (found, true))
        patients.append(_patient(*(mask & counted for mask in joined), true.voxel_ml))  # pyright: ignore[reportCallIssue]
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
    yield f"wrote cases.csv, summary.json, plot.png to {out}"


def compare(
    predicted: np.ndarray, truth: np.ndarray, spacing: Sequence[float], *, tolerance: float = 1.0
) -> dict[str, float]:
    """All scores of one class in one case.

    Args:
        predicted, truth: bool (Z, Y, X).
        spacing: mm.
        tolerance: distance in mm that NSD forgives.

    Returns: ``TP FP FN TN n_pred n_ref`` in voxels; ``Dice IoU NSD`` in [0, 1]; ``HD95 ASSD`` in mm; volumes in ml.
    Raises: ValueError if the shapes differ.
    """
    if predicted.shape != truth.shape:
        raise ValueError(f"compare: shapes {predicted.shape} and {truth.shape} differ")
    tp = int((predicted & truth).sum())
    fp, fn = int(predicted.sum()) - tp, int(truth.sum()) - tp
    union = tp + fp + fn
    voxel = float(np.prod(spacing)) / 1000
    distances = surface_distances(predicted, truth, spacing)
    return {
        "TP": tp,
        "FP": fp,
        "FN": fn,
        "TN": predicted.size - union,
        "n_pred": tp + fp,
        "n_ref": tp + fn,
        "Dice": 2 * tp / (union + tp) if union else float("nan"),
        "IoU": tp / union if union else float("nan"),
        **_of_distances(distances, tolerance),
        "ml_pred": (tp + fp) * voxel,
        "ml_ref": (tp + fn) * voxel,
    }


def surface_distances(
    predicted: np.ndarray, truth: np.ndarray, spacing: Sequence[float]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Distances in mm from each surface voxel of one mask to the nearest of the other, both ways; None if both empty.

    A surface voxel touches the outside through a face. If one mask is empty, distances to it are infinite.
    """
    either = predicted | truth
    if not either.any():
        return None
    box = tuple(slice(max(0, at.min() - 1), at.max() + 2) for at in np.nonzero(either))
    # The border adds what a mask at the edge of the image touches: the outside.
    flat = predicted.shape[0] == 1
    border = [(0, 0) if flat and axis == 0 else (1, 1) for axis in range(3)]
    masks = [np.pad(mask[box], border) for mask in (predicted, truth)]
    structure = ndimage.generate_binary_structure(3, 1)
    if flat:
        structure = structure & (np.arange(3) == 1)[:, None, None]
    surfaces = [mask ^ ndimage.binary_erosion(mask, structure) for mask in masks]
    found = []
    for own, other in (surfaces, surfaces[::-1]):
        if not other.any():
            found.append(np.full(int(own.sum()), np.inf))
        else:
            distance: Any = ndimage.distance_transform_edt(~other, sampling=spacing)
            found.append(distance[own])
    return found[0], found[1]


def _of_distances(distances: tuple[np.ndarray, np.ndarray] | None, tolerance: float) -> dict[str, float]:
    if distances is None:
        return dict.fromkeys(("HD95", "ASSD", "NSD"), float("nan"))
    if any(not len(d) for d in distances):
        return {"HD95": float("inf"), "ASSD": float("inf"), "NSD": 0.0}
    joined = np.concatenate(distances)
    return {
        "HD95": float(max(np.percentile(d, 95) for d in distances)),
        "ASSD": float(joined.mean()),
        "NSD": float((joined <= tolerance).mean()),
    }


def summarize(
    rows: Sequence[dict[str, Any]],
    patients: Sequence[dict[str, float]],
    *,
    by_volume: float = SMALL_ML,
    overlap: float = 0.0,
) -> dict[str, Any]:
    """What nnU-Net's summary.json holds, and the patients' table of the AGUNet paper.

    Args:
        rows: ``case``, ``label`` and what `compare` gives.
        patients: ``Dice``, ``ml_pred`` and ``ml_ref`` of each case, all foreground joined.
        by_volume: ml of truth that divide small from large.
        overlap: Dice above which a patient counts as found.

    Returns: ``metric_per_case``, ``mean`` by label, ``foreground_mean``, ``patients`` by group.
    """
    labels = list(dict.fromkeys(row["label"] for row in rows))
    mean = {str(label): _means([row for row in rows if row["label"] == label]) for label in labels}
    keys = [key for key in next(iter(mean.values())) if key not in ("n", "infinite_distances")]
    foreground = {key: _nanmean([table[key] for table in mean.values()]) for key in keys}
    small = [p for p in patients if 0 < p["ml_ref"] < by_volume]
    large = [p for p in patients if p["ml_ref"] >= by_volume]
    empty = [p for p in patients if p["ml_ref"] == 0]
    return {
        "metric_per_case": list(rows),
        "mean": mean,
        "foreground_mean": foreground,
        "patients": {
            "all": patient_table(patients, overlap),
            f"truth below {by_volume:g} ml": patient_table([*small, *empty], overlap),
            f"truth of {by_volume:g} ml or more": patient_table([*large, *empty], overlap),
        },
    }


def patient_table(patients: Sequence[dict[str, float]], overlap: float = 0.0) -> dict[str, float]:
    """Detection by patient: a lesion counts as found if the masks overlap by more than ``overlap`` (Dice).

    true positive: found; false negative: there is a lesion and it is not found; false positive: none is there and one
    is predicted; true negative: neither. Specificity is 1 without patients that have none.

    Args:
        patients: ``Dice``, ``ml_pred`` and ``ml_ref`` each.

    Source: dbouget/validation_metrics_computation, patient-wise metrics.
    """
    found = [p for p in patients if p["ml_ref"] > 0 and p["ml_pred"] > 0 and p["Dice"] > overlap]
    tp = len(found)
    fn = sum(p["ml_ref"] > 0 for p in patients) - tp
    fp = sum(p["ml_ref"] == 0 and p["ml_pred"] > 0 for p in patients)
    tn = sum(p["ml_ref"] == 0 and p["ml_pred"] == 0 for p in patients)
    recall = tp / (tp + fn) if tp + fn else float("nan")
    precision = tp / (tp + fp) if tp + fp else float("nan")
    return {
        "n": tp + fn,
        "TP": tp,
        "FP": fp,
        "FN": fn,
        "TN": tn,
        "recall": recall,
        "precision": precision,
        "F1": 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else float("nan"),
        "specificity": tn / (tn + fp) if tn + fp else 1.0,
        "Dice_all": _nanmean([p["Dice"] for p in patients]),
        "Dice_found": _nanmean([p["Dice"] for p in found]),
    }


def _patient(found: np.ndarray, true: np.ndarray, voxel_ml: float) -> dict[str, float]:
    sizes = int(found.sum()), int(true.sum())
    dice = 2 * int((found & true).sum()) / sum(sizes) if sum(sizes) else float("nan")
    return {"Dice": dice, "ml_pred": sizes[0] * voxel_ml, "ml_ref": sizes[1] * voxel_ml}


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    keys = [key for key in rows[0] if key not in ("case", "label", *DISTANCES)]
    table: dict[str, Any] = {key: _nanmean([row[key] for row in rows]) for key in keys}
    for key in DISTANCES:
        table[key] = _nanmean([row[key] for row in rows if not np.isinf(row[key])])
    tp, fp, fn = (sum(row[key] for row in rows) for key in ("TP", "FP", "FN"))
    table["Dice_micro"] = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else float("nan")
    table["n"] = sum(not np.isnan(row["Dice"]) for row in rows)
    table["infinite_distances"] = sum(bool(np.isinf(row["HD95"])) for row in rows)
    return table


def _nanmean(values: Sequence[float]) -> float:
    kept = [value for value in values if not np.isnan(value)]
    return float(np.mean(kept)) if kept else float("nan")


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
    found = {}
    for folder in (truth, predicted):
        if not folder.is_dir():
            raise ValueError(f"{folder}: there is no such folder")
    theirs = {_stem(file): file for file in predicted.iterdir() if _is_mask(file)}
    for file in sorted(truth.iterdir()):
        if not _is_mask(file):
            continue
        if _stem(file) not in theirs:
            raise ValueError(f"{predicted / file.name}: missing; {file} has no prediction")
        found[_stem(file)] = (file, theirs[_stem(file)])
    if not found:
        raise ValueError(f"{truth}: holds no masks")
    return found


def _is_mask(file: Path) -> bool:
    return bool(suffix(file)) and not file.name.startswith(".") and not file.name.endswith("_overlay.png")


def _stem(file: Path) -> str:
    return file.name.removesuffix(suffix(file))


def _labels(files: Sequence[Path]) -> list[int]:
    labels: set[int] = set()
    for file in files:
        values = np.unique(read_volume([file]).data)
        if (values != values.round()).any():
            raise ValueError(f"{file}: labels are not integers, found {values[values != values.round()][0]:g}")
        labels |= {int(value) for value in values if value > 0}
    if not labels:
        raise ValueError(f"{files[0].parent}: every mask is empty")
    return sorted(labels)


def _plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Dice against the true volume, one color per label."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for label in dict.fromkeys(row["label"] for row in rows):
        mine = [row for row in rows if row["label"] == label and row["n_ref"]]
        axis.plot([r["ml_ref"] for r in mine], [r["Dice"] for r in mine], "o", alpha=0.7, label=f"label {label}")
    if any(row["n_ref"] for row in rows):
        axis.set_xscale("log")
    axis.set(xlabel="true volume [ml]", ylabel="Dice", ylim=(-0.02, 1.02))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
