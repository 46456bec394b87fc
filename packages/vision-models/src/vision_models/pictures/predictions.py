"""``predictions.png``: the images of a part that a classifier is least sure of."""

import heapq
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

SHOWN = 40
COLUMNS = 8


class Gallery:
    """Collects the images that convince least, without keeping a whole part: errors first, then the least certain.

    Args:
        preprocess: the data set's, whose normalization is undone.
    """

    def __init__(self, preprocess: Mapping[str, Any]) -> None:
        self.mean = torch.tensor(preprocess.get("mean", (0.485, 0.456, 0.406))).view(-1, 1, 1)
        self.std = torch.tensor(preprocess.get("std", (0.229, 0.224, 0.225))).view(-1, 1, 1)
        self.kept: list[tuple[float, int, tuple[Tensor, int, float, int]]] = []
        self.errors = self.total = 0

    def add(self, images: Tensor, scores: Tensor, labels: Tensor) -> None:
        """A batch: images (B, C, Y, X), scores (B, K) that sum to one, labels (B,)."""
        best = scores.max(1)
        for image, chance, guess, label in zip(
            images, best.values.tolist(), best.indices.tolist(), labels.tolist(), strict=True
        ):
            wrong = guess != label
            self.errors, self.total = self.errors + wrong, self.total + 1
            entry = (wrong + 1 - chance, -self.total, (image.cpu(), guess, chance, label))
            (heapq.heappush if len(self.kept) < SHOWN else heapq.heappushpop)(self.kept, entry)

    def draw(self, names: list[str], path: Path) -> None:
        """A PNG 1,100 pixels wide: above each image what the model says and how sure it is, in an error what is true.

        Args:
            names: of the classes, as they can be drawn.
        """
        kept = sorted(self.kept, reverse=True)
        rows = max(1, -(-len(kept) // COLUMNS))
        figure = Figure(figsize=(11, 1.75 * rows + 0.5), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(
            f"{self.errors} of {self.total} images wrong ({100 * (1 - self.errors / max(self.total, 1)):.2f} % right); "
            f"shown: the {len(kept)} least certain, errors framed",
            fontsize=11,
            x=0.01,
            ha="left",
        )
        grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
        for axis in grid:
            axis.set_axis_off()
        for axis, (_, _, (image, guess, chance, label)) in zip(grid, kept, strict=False):
            pixels = (image * self.std + self.mean).clamp(0, 1).permute(1, 2, 0).squeeze(-1).numpy()
            axis.imshow(pixels, cmap="gray", vmin=0, vmax=1)
            axis.set_axis_on()
            axis.set_xticks([])
            axis.set_yticks([])
            wrong = guess != label
            text = f"{_short(names[guess])}  {100 * chance:.0f} %" + (
                f"\ntrue: {_short(names[label])}" if wrong else ""
            )
            axis.set_title(text, fontsize=9, color="#c92a2a" if wrong else "#2b8a3e")
            axis.spines[:].set(color="#c92a2a" if wrong else "#ced4da", linewidth=3 if wrong else 0.8)
        figure.savefig(path)


def _short(name: str) -> str:
    return name if len(name) <= 13 else f"{name[:12]}…"
