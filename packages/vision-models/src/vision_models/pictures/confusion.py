"""The confusion matrix as a picture and a table, and precision, recall and F1 of each class."""

import csv
import textwrap
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

MOST_SHOWN = 30  # classes whose names can still be read on a picture of 1,100 pixels


def write_confusion(counts: Tensor, classes: list[str], path: Path) -> None:
    """``counts[true, predicted]`` with the classes' names."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["true \\ predicted", *classes])
        writer.writerows([name, *row] for name, row in zip(classes, counts.tolist(), strict=True))


def write_classes(counts: Tensor, classes: list[str], path: Path) -> None:
    """A row for each class: images, right ones, recall, precision, F1, and the class it is most often taken for.

    What has no denominator stays empty: recall of a class without images, precision of one never predicted.
    """
    right = counts.diagonal()
    images, predicted = counts.sum(1), counts.sum(0)
    wrong = counts - torch.diag(right)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["class", "images", "right", "recall", "precision", "f1", "most often taken for"])
        for i, name in enumerate(classes):
            rival = int(wrong[i].argmax())
            writer.writerow(
                [
                    name,
                    int(images[i]),
                    int(right[i]),
                    _share(right[i], images[i]),
                    _share(right[i], predicted[i]),
                    _share(2 * right[i], images[i] + predicted[i]),
                    classes[rival] if wrong[i, rival] > 0 else "",
                ]
            )


def _share(part: Tensor, whole: Tensor) -> str:
    return f"{int(part) / int(whole):.4f}" if whole > 0 else ""


def draw_confusion(counts: Tensor, names: list[str], path: Path) -> None:
    """A PNG of at most 1,100 pixels: counts in the cells, right ones blue, wrong ones red, by their share of the row.

    Args:
        counts: (K, K), true class in the row.
        names: of the classes, as they can be drawn.
    """
    total, right = int(counts.sum()), int(counts.diagonal().sum())
    wrong = counts - torch.diag(counts.diagonal())
    title = f"{right} of {total} right ({100 * right / max(total, 1):.2f} %)"
    if len(names) > MOST_SHOWN:
        chosen = (wrong.sum(0) + wrong.sum(1)).topk(MOST_SHOWN).indices.sort().values
        title += f"; the {MOST_SHOWN} of {len(names)} classes with most errors, all in confusion.csv"
        counts, names = counts[chosen][:, chosen], [names[i] for i in chosen.tolist()]
    size = len(names)
    names = [name if len(name) <= 20 else f"{name[:19]}…" for name in names]
    side = min(11.0, 3.4 + 0.42 * size)
    figure = Figure(figsize=(side, side), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    share = counts / counts.sum(1, keepdim=True).clamp(min=1)
    # right in blue, wrong in red, white where nothing is
    ink = torch.where(
        torch.eye(size, dtype=torch.bool)[..., None], torch.tensor([0.9, 0.55, 0.2]), torch.tensor([0.2, 0.7, 0.7])
    )
    axis.imshow((1 - share[..., None] * ink).numpy())
    font = 10 if size <= 16 else 7.5
    for row in range(size):
        for column in range(size):
            if counts[row, column]:
                color = "white" if share[row, column] > 0.6 else "black"
                text = f"{int(counts[row, column])}"
                axis.text(column, row, text, ha="center", va="center", color=color, fontsize=font)
    axis.set_xticks(range(size), names, rotation=60 if max(map(len, names)) > 3 else 0, ha="center", fontsize=font)
    axis.set_yticks(range(size), names, fontsize=font)
    axis.set_xlabel("predicted", fontsize=10)
    axis.set_ylabel("true", fontsize=10)
    axis.set_title(textwrap.fill(title, int(9 * side)), fontsize=10, loc="left")
    axis.tick_params(length=0)
    axis.set_xticks([i - 0.5 for i in range(1, size)], minor=True)
    axis.set_yticks([i - 0.5 for i in range(1, size)], minor=True)
    axis.grid(which="minor", color="#dee2e6", linewidth=0.6)
    axis.tick_params(which="minor", length=0)
    figure.savefig(path)
