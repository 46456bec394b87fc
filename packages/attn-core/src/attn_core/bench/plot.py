"""Time and memory against length, one line per provider."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .case import OWN
from .measure import PASSES


def plot(rows: Sequence[dict[str, Any]], path: Path, *, digest: str = "") -> None:
    """Draw the length sweep of one operator and dtype, log-log, with a guide of slope 2 in the memory plots.

    Args:
        rows: of a result file; those without a length are left out.
        digest: stored in the picture, so that a reader can tell which rows it shows.

    Raises:
        ValueError: no row belongs to a length sweep.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in rows if row["length"] is not None and row["ms"] is not None]
    if not rows:
        raise ValueError("plot: no row belongs to a length sweep")
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    passes = [kind for kind in PASSES if any(row["pass"] == kind for row in rows)]
    figure = Figure(figsize=(9, 3.4 * len(passes)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(passes), 2, squeeze=False)
    for (time_axis, memory_axis), kind in zip(axes, passes, strict=True):
        for key, axis, unit in (("ms", time_axis, "ms"), ("mem_mb", memory_axis, "peak memory, MiB")):
            for number, provider in enumerate(providers):
                points = [(r["length"], r[key]) for r in rows if r["pass"] == kind and r["provider"] == provider]
                if points:
                    style = {"linewidth": 2.4} if provider in OWN else {"linewidth": 1.2, "linestyle": "--"}
                    label = f"attn-core, {provider}" if provider in OWN else provider
                    axis.plot(*zip(*sorted(points), strict=True), marker="o", color=f"C{number}", label=label, **style)
            axis.set(xscale="log", yscale="log", xlabel="tokens", ylabel=unit, title=kind)
            axis.grid(visible=True, which="both", alpha=0.25)
            lengths = sorted({row["length"] for row in rows})
            axis.set_xticks(lengths, [str(length) for length in lengths], minor=False)
            axis.minorticks_off()
        _guide(memory_axis, rows, kind)
    for axis in axes[0]:
        axis.legend(fontsize=8)
    first = rows[0]
    what = first["case"].partition(", ")[2]
    figure.suptitle(", ".join(part for part in (f"attn_core.{first['op']}", what, first["dtype"]) if part))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, metadata={"Software": None, "Description": digest})


def _guide(axis: Any, rows: Sequence[dict[str, Any]], kind: str) -> None:
    """A dotted line that grows with the square of the length, from the largest memory at the shortest one."""
    lengths = sorted({row["length"] for row in rows})
    at_first = [r["mem_mb"] for r in rows if r["length"] == lengths[0] and r["pass"] == kind and r["mem_mb"]]
    if at_first:
        squares = [max(at_first) * (length / lengths[0]) ** 2 for length in lengths]
        axis.plot(lengths, squares, linestyle=":", color="0.5", label="L²")
