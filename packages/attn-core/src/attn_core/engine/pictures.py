"""Pictures at the end of a run."""

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_NOT_DRAWN = {"split", "step", "epoch", "seconds", "grad_norm"}


def draw_curves(metrics: Path, picture: Path, *, chosen: int | None = None) -> None:
    """Loss, each validation metric and the learning rate over the steps, from ``metrics.jsonl``, as one PNG.

    Args:
        metrics: The file of the run.
        picture: The PNG to write.
        chosen: Step of the weights that were selected, marked in the validation panels.
    """
    lines = [json.loads(line) for line in metrics.read_text().splitlines() if line]
    train = [line for line in lines if line["split"] == "train"]
    val = [line for line in lines if line["split"] == "val"]
    rates = sorted({name for line in train for name in line if name.endswith("lr")})
    losses = sorted({name for line in train for name in line} - _NOT_DRAWN - set(rates))
    scores = sorted({name for line in val for name in line} - _NOT_DRAWN)
    panels = [("training loss", train, losses), *((f"validation {name}", val, [name]) for name in scores)]
    panels = [panel for panel in [*panels, ("learning rate", train, rates)] if panel[2]]
    if not panels:
        return
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for column, (title, source, names) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), column)
        for name in names:
            points = [(line["step"], line[name]) for line in source if line.get(name) is not None]
            _draw(axes, points, name, dots=source is val and len(points) <= 60)
        axes.set_title(title.replace("_", " "), loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if source is val and chosen is not None:
            axes.axvline(chosen, color="0.4", linestyle="--", linewidth=1)
            axes.annotate("selected", (chosen, 0.02), xycoords=("data", "axes fraction"), rotation=90, ha="right")
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=8)
    temporary = picture.with_name(f".{picture.stem}.writing.png")
    figure.savefig(temporary, dpi=150)
    temporary.replace(picture)


def _draw(axes: Any, points: list[tuple[int, float]], name: str, *, dots: bool) -> None:
    steps, values = zip(*points, strict=True) if points else ((), ())
    axes.plot(steps, values, linewidth=1.4, marker="o" if dots else None, markersize=3, label=name)
    if values and min(values) > 0 and max(values) > 20 * min(values) and not name.endswith("lr"):
        axes.set_yscale("log")
