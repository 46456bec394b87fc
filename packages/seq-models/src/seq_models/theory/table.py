"""The table of random-feature errors and its picture: ``python -m seq_models.theory.table --out FOLDER``."""

import argparse
import json
from pathlib import Path
from statistics import mean

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from seq_models.theory.random_features import MODELS, Target, errors

ROWS: tuple[tuple[Target, tuple[int, ...]], ...] = (
    (Target("beta", 2), (256, 1024)),
    (Target("query", 2), (64, 256, 1024)),
    (Target("query", 3), (256, 1024)),
    (Target("beta", 1), (64, 256)),
)


def measure(
    rows: tuple[tuple[Target, tuple[int, ...]], ...] = ROWS, seeds: tuple[int, ...] = (0,), heads: int = 1000
) -> list[dict[str, object]]:
    """Rows ``{"target", "samples", "RFA", "BRFA", "RF-MLP"}``, means over seeds."""
    table: list[dict[str, object]] = []
    for target, sizes in rows:
        for samples in sizes:
            found = [errors(target, samples, seed=seed, heads=heads) for seed in seeds]
            table.append(
                {"target": target.title, "samples": samples, **{name: mean(f[name] for f in found) for name in MODELS}}
            )
    return table


def draw(table: list[dict[str, object]], path: Path) -> None:
    """Error by number of samples, a panel for each target."""
    titles = list(dict.fromkeys(row["target"] for row in table))
    figure = Figure(figsize=(3 * len(titles), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for axes, title in zip(panels, titles, strict=True):
        rows = [row for row in table if row["target"] == title]
        for name in MODELS:
            axes.loglog([row["samples"] for row in rows], [row[name] for row in rows], marker="o", label=name)
        axes.set_title(str(title), loc="left", fontsize=10)
        sizes = [row["samples"] for row in rows]
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("samples")
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test error / variance")
    panels[-1].legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Write ``random_features.json`` and ``random_features.png``."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path(), help="folder")
    parser.add_argument("--seeds", type=int, default=1, help="how many")
    given = parser.parse_args()
    table = measure(seeds=tuple(range(given.seeds)))
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "random_features.json").write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n")
    draw(table, given.out / "random_features.png")
    for row in table:
        figures = "  ".join(f"{name} {row[name]:.4f}" for name in MODELS)
        print(f"{row['target']}, n = {row['samples']}: {figures}")


if __name__ == "__main__":
    main()
