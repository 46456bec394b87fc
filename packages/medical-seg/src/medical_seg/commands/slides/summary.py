"""``slides summary``: the figures of several runs, as means over splits or seeds."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from medical_seg.package import PACKAGE

FIGURES = ("auc_macro", "f1_macro", "balanced_accuracy", "accuracy")


def summary(
    runs: Annotated[list[Path], typer.Argument(help="Finished runs, one for each split or seed.", metavar="RUN...")],
    out: Annotated[Path | None, typer.Option("--out", help="Write the figures to this .json file, too.")] = None,
) -> Iterator[str]:
    """Mean and standard deviation of the test figures of runs on the same classes."""
    from attn_core.engine.run_directory import about_run, require_run

    rows: list[dict[str, Any]] = []
    classes: list[str] | None = None
    for run in runs:
        require_run(PACKAGE, run)
        try:
            test = json.loads((run / "result.json").read_text(encoding="utf-8"))["test"]
            rows.append({"run": str(run), **{name: float(test[name]) for name in FIGURES}})
        except (OSError, ValueError, KeyError, TypeError):
            raise ValueError(f"{run}: holds no figures of a test on slides; was the run finished?") from None
        mine = about_run(run).get("data_info", {}).get("classes")
        if classes is not None and mine != classes:
            raise ValueError(f"{run}: its classes are {mine}, those of {runs[0]} are {classes}")
        classes = mine
    for row in rows:
        yield f"{row['run']}: " + ", ".join(f"{_said(name)} {row[name]:.3f}" for name in FIGURES)
    means = {name: statistics.fmean(row[name] for row in rows) for name in FIGURES}
    spread = {name: statistics.stdev(row[name] for row in rows) if len(rows) > 1 else 0.0 for name in FIGURES}
    of = f"mean ± standard deviation of {len(rows)} runs"
    yield f"{of}: " + ", ".join(f"{_said(name)} {means[name]:.3f} ± {spread[name]:.3f}" for name in FIGURES)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"classes": classes, "runs": rows, "mean": means, "deviation": spread}, indent=1)
        out.write_text(text + "\n", encoding="utf-8")


def _said(name: str) -> str:
    return {"auc_macro": "macro AUC", "f1_macro": "macro F1", "balanced_accuracy": "balanced accuracy"}.get(name, name)
