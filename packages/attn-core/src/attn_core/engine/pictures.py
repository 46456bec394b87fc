"""Pictures at the end of a run."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_NOT_DRAWN = {"split", "step", "epoch", "seconds", "grad_norm"}
_PANELS = 6  # two rows of three
_LEGEND = 6  # names that a legend can hold
_PANEL_INCHES = (3.6, 2.8)  # three in a row are 1,080 pixels wide


class _Line(NamedTuple):
    name: str
    points: list[tuple[int, float]]
    dots: bool


def draw_curves(metrics: Path, picture: Path, *, chosen: int | None = None) -> None:
    """Losses, each kind of validation metric and the learning rate over the steps, from ``metrics.jsonl``, as one PNG.

    At most six panels; ``dice_csf`` and ``dice_grey`` are of one kind and share an axis. What finds no place is in the
    file.

    Args:
        metrics: The file of the run.
        picture: The PNG to write.
        chosen: Step of the weights that were selected, marked in the validation panels.
    """
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines() if line]
    panels = _panels(rows)
    if not panels:
        return
    columns = len(panels) if len(panels) <= 3 else -(-len(panels) // 2)
    height = -(-len(panels) // columns)
    figure = Figure(figsize=(_PANEL_INCHES[0] * columns, _PANEL_INCHES[1] * height), layout="constrained")
    FigureCanvasAgg(figure)
    for place, (title, lines) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(height, columns, place)
        _draw(axes, title, lines)
        if chosen is not None and title.startswith("validation"):
            axes.axvline(chosen, color="0.4", linestyle="--", linewidth=1)
            axes.annotate("selected", (chosen, 0.03), xycoords=("data", "axes fraction"), rotation=90, ha="right",
                          fontsize=8, color="0.3")  # fmt: skip
    temporary = picture.with_name(f".{picture.stem}.writing.png")
    figure.savefig(temporary, dpi=100)
    temporary.replace(picture)


def _panels(rows: list[dict[str, Any]]) -> dict[str, list[_Line]]:
    """Title → lines: the losses, the kinds of validation metrics (those measured first come first), the rates."""
    train, val = ([row for row in rows if row["split"] == split] for split in ("train", "val"))
    names = list(dict.fromkeys(name for row in train for name in row if name not in _NOT_DRAWN))
    rates = [_line(train, name, name) for name in names if name.endswith("lr")]
    losses = [_line(train, name, name) for name in names if not name.endswith("lr")]
    kinds: dict[str, list[_Line]] = {}
    for name in dict.fromkeys(name for row in val for name in row if name not in _NOT_DRAWN):
        if "loss" in name:
            losses.append(_line(val, name, f"validation {name}", dots=True))
        else:
            kinds.setdefault(_kind(name), []).append(_line(val, name, name, dots=True))
    panels = {"loss": losses, **{f"validation {kind}": lines for kind, lines in list(kinds.items())[: _PANELS - 2]}}
    panels["learning rate"] = _distinct(rates)
    return {title: drawn for title, lines in panels.items() if (drawn := [line for line in lines if line.points])}


def _kind(name: str) -> str:
    """``dice`` of ``dice_csf``, ``AP`` of ``AP50``, ``accuracy`` of ``accuracy_top5``."""
    letters = re.match(r"[^\W\d_]+", name)
    return letters[0] if letters else name


def _line(rows: list[dict[str, Any]], key: str, name: str, *, dots: bool = False) -> _Line:
    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
    return _Line(name.replace("_", " "), points, dots and len(points) <= 60)


def _distinct(lines: list[_Line]) -> list[_Line]:
    """Each course once: mmengine logs the rate and the base rate, which mostly are one."""
    seen: list[_Line] = []
    for line in sorted(lines, key=lambda line: len(line.name)):
        if all(line.points != other.points for other in seen):
            seen.append(line)
    return seen


def _draw(axes: Any, title: str, lines: list[_Line]) -> None:
    """One panel; of more lines than a legend can hold only the first ones are named, the others are thin and grey."""
    named = lines if len(lines) <= _LEGEND else lines[: _LEGEND - 1]
    for line in lines:
        steps, values = zip(*line.points, strict=True)
        look: dict[str, Any] = {"marker": "o" if line.dots else None, "markersize": 3}
        if line in named:
            axes.plot(steps, values, linewidth=1.4, label=line.name, zorder=2, **look)
        else:
            axes.plot(steps, values, linewidth=0.7, color="0.75", zorder=1, **look)
    if len(named) < len(lines):
        axes.plot([], [], color="0.75", linewidth=0.7, label=f"{len(lines) - len(named)} more")
    values = [value for line in lines for _, value in line.points]
    if min(values) > 0 and max(values) > 20 * min(values) and title != "learning rate":
        axes.set_yscale("log")
    axes.set_title(title if len(lines) > 1 else _single(title, lines[0]), loc="left", fontsize=10)
    axes.set_xlabel("step", fontsize=9)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if len(lines) > 1:
        axes.legend(fontsize=8, framealpha=0.8, edgecolor="none")


def _single(title: str, line: _Line) -> str:
    """A panel of one line says which."""
    return f"validation {line.name}" if title.startswith("validation") else title
