"""Pictures at the end of a run."""

import json
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_NOT_DRAWN = {"split", "step", "epoch", "seconds", "grad_norm"}


def draw_curves(metrics: Path, picture: Path) -> None:
    """Loss, validation metrics and learning rate over the steps, from ``metrics.jsonl``, as one PNG."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines() if line]
    train = [line for line in lines if line["split"] == "train"]
    val = [line for line in lines if line["split"] == "val"]
    rates = sorted({name for line in train for name in line if name.endswith("lr")})
    losses = sorted({name for line in train for name in line} - _NOT_DRAWN - set(rates))
    scores = sorted({name for line in val for name in line} - _NOT_DRAWN)
    panels = [("training loss", train, losses), ("validation", val, scores), ("learning rate", train, rates)]
    panels = [panel for panel in panels if panel[2]]
    if not panels:
        return
    figure = Figure(figsize=(4.2 * len(panels), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for column, (title, source, names) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), column)
        for name in names:
            points = [(line["step"], line[name]) for line in source if line.get(name) is not None]
            _draw(axes, points, name, dots=source is val and len(points) <= 60)
        axes.set_title(title, loc="left", fontsize=11)
        axes.set_xlabel("step")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if title == "training loss" and all((line.get(name) or 0) > 0 for line in source for name in names):
            axes.set_yscale("log")
        if len(names) > 1:
            axes.legend(frameon=False, fontsize=8)
        elif title == "validation":
            axes.set_ylabel(names[0])
    temporary = picture.with_name(f".{picture.stem}.writing.png")
    figure.savefig(temporary, dpi=150)
    temporary.replace(picture)


def _draw(axes: Any, points: list[tuple[int, float]], name: str, *, dots: bool) -> None:
    steps, values = zip(*points, strict=True) if points else ((), ())
    axes.plot(steps, values, linewidth=1.4, marker="o" if dots else None, markersize=3, label=name)
