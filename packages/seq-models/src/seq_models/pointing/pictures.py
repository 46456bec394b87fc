"""Predicted hulls, triangulations and tours beside the truth."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from seq_models.pointing.geometry import GeometryTask, tour_lengths
from seq_models.pointing.metrics import same_cycle, triangles

COLUMNS, ROWS = 6, 4
RIGHT, WRONG, TRUTH = "#2b8a3e", "#c92a2a", "#adb5bd"


@torch.no_grad()
def draw_answers(model: nn.Module, loader: Iterable[dict[str, Any]], path: Path, task: GeometryTask) -> None:
    """24 instances of the loader's first batches: half of them wrong answers if there are enough.

    The truth is the broad gray line; an answer is green if it is right, otherwise red.
    """
    right: list[dict[str, Any]] = []
    wrong: list[dict[str, Any]] = []
    device = next(model.parameters()).device
    total = 0
    for batch in loader:
        for sample in model.predict(**{k: v.to(device) for k, v in batch.items()}):  # pyright: ignore[reportCallIssue]
            (right if is_right(task, sample) else wrong).append(sample)
            total += 1
        if len(wrong) >= COLUMNS * ROWS // 2 and len(right) >= COLUMNS * ROWS // 2:
            break
    errors = len(wrong)
    half = COLUMNS * ROWS // 2
    count_wrong = min(errors, max(half, COLUMNS * ROWS - len(right)))
    shown = wrong[:count_wrong] + right[: COLUMNS * ROWS - count_wrong]
    figure = Figure(figsize=(2 * COLUMNS, 2.15 * ROWS + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(
        f"{total - errors} of {total} instances {'optimal' if task == 'tsp' else 'right'}; "
        f"shown: {count_wrong} others (red) and {len(shown) - count_wrong} of these; gray: the truth",
        fontsize=11,
        x=0.01,
        ha="left",
    )
    for axes, sample in zip(figure.subplots(ROWS, COLUMNS, squeeze=False).ravel(), shown, strict=False):
        draw_instance(axes, task, sample["points"], sample["pointers"], sample["truth"])
    figure.savefig(path, dpi=110)


def draw_answer(path: Path, task: GeometryTask, points: torch.Tensor, answer: Sequence[int]) -> None:
    """One answer whose truth nobody knows."""
    figure = Figure(figsize=(5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    draw_instance(figure.subplots(), task, points, answer, None)
    figure.savefig(path, dpi=120)


def draw_instances(
    path: Path,
    task: GeometryTask,
    points: Float[Tensor, "12 N 2"],
    given: Sequence[Sequence[int]],
    truth: Sequence[Sequence[int]],
    chances: Sequence[float],
) -> None:
    """Twelve answers beside the truth, with their probabilities."""
    figure = Figure(figsize=(12, 9.6), layout="constrained")
    FigureCanvasAgg(figure)
    for row, axes in enumerate(figure.subplots(3, 4).ravel()):
        draw_instance(axes, task, points[row], given[row], truth[row])
        axes.set_title(f"p = {chances[row]:.3f}", fontsize=9)
    figure.savefig(path, dpi=110)


def is_right(task: GeometryTask, sample: dict[str, Any]) -> bool:
    """Whether an answer counts as right; a tour, if it is at most 0.01 % longer."""
    answer, truth = sample["pointers"], sample["truth"]
    if task == "hull":
        return same_cycle(answer, truth)
    if task == "delaunay":
        return len(answer) % 3 == 0 and triangles(answer) == triangles(truth)
    if sorted(answer) != sorted(truth):
        return False
    lengths = tour_lengths(sample["points"].expand(2, -1, -1), torch.tensor([answer, truth]) - 1)
    return bool(lengths[0] <= 1.0001 * lengths[1])


def draw_instance(
    axes: Axes, task: GeometryTask, points: torch.Tensor, answer: Sequence[int], truth: Sequence[int] | None
) -> None:
    """One instance; without a truth the answer is blue."""
    color = "#1c7ed6"
    if truth is not None:
        color = RIGHT if is_right(task, {"points": points, "pointers": answer, "truth": truth}) else WRONG
        _draw_lines(axes, task, points, truth, color=TRUTH, linewidth=5, solid_capstyle="round")
    _draw_lines(axes, task, points, answer, color=color, linewidth=1.4)
    x, y = points.T.tolist()
    axes.scatter(x, y, s=16, color="#212529", zorder=3)
    for number, (a, b) in enumerate(points.tolist(), start=1):
        axes.annotate(str(number), (a, b), textcoords="offset points", xytext=(3, 3), fontsize=7)
    axes.set_aspect("equal")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.margins(0.1)
    axes.spines[:].set(color="#ced4da")


def _draw_lines(axes: Axes, task: GeometryTask, points: torch.Tensor, pointers: Sequence[int], **style: Any) -> None:
    cycles = [pointers]
    if task == "delaunay":
        cycles = [sorted(triangle) for triangle in triangles(pointers)]
    for cycle in cycles:
        if cycle:
            corners = points[torch.tensor([*cycle, cycle[0]]) - 1]
            axes.plot(*corners.T.tolist(), **style)
