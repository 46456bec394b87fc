"""Maps of an object and the boxes drawn from them, over pictures whose boxes are known or not."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from attn_core.lettering import lettered
from vision_models.localization.boxes import iou, largest_boxes

SHOWN, COLUMNS = 32, 8
FOUND, TRUE, WRONG = "#f08c00", "#2b8a3e", "#c92a2a"
THRESHOLD = 0.4  # of the map, where none is chosen on a test part


@torch.no_grad()
def report(model: nn.Module, loader: Iterable[dict[str, Any]], path: Path) -> list[str]:
    """The first pictures of a part with the true box and the one of the map; gives the names of further files: none.

    Args:
        model: a ``LocalizationTask`` in eval mode.
        loader: of a data set with ``boxes``, whose ``metainfo`` holds ``classes`` and ``preprocess``.
        path: of the picture.
    """
    info = loader.dataset.metainfo  # pyright: ignore[reportAttributeAccessIssue]
    device = next(model.parameters()).device
    shown: list[tuple[Tensor, dict[str, Any]]] = []
    for batch in loader:
        results = model.predict(**{key: value.to(device) for key, value in batch.items()})  # pyright: ignore[reportCallIssue]
        shown += list(zip(batch["image"], results, strict=True))
        if len(shown) >= SHOWN:
            break
    shown = shown[:SHOWN]
    with lettered([str(name) for name in info["classes"]]) as names:
        rows = max(1, -(-len(shown) // COLUMNS))
        figure = Figure(figsize=(11, 1.75 * rows + 0.5), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(
            f"boxes of the map above {THRESHOLD} (orange) and true ones (green); red: overlap below a half",
            fontsize=11, x=0.01, ha="left",
        )  # fmt: skip
        grid = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
        for axis in grid:
            axis.set_axis_off()
        for axis, (image, result) in zip(grid, shown, strict=False):
            box = largest_boxes(result["map"][None], THRESHOLD)[0]
            overlap = float(iou(box[None], result["boxes"]).max())
            guess = int(torch.as_tensor(result["scores"]).argmax())
            title = f"{names[guess][:13]}  {100 * overlap:.0f} %"
            _draw(axis, plain(image, info["preprocess"]), result["map"], box, result["boxes"])
            axis.set_title(title, fontsize=9, color=TRUE if overlap >= 0.5 else WRONG)
        figure.savefig(path)
    return []


def draw(image: Tensor, preprocess: Mapping[str, Any], found: Tensor, title: str, path: Path) -> tuple[int, ...]:
    """One picture beside its map; gives the box of the map in pixels of the image: left, top, right, bottom.

    Args:
        image: (C, Y, X), as the network sees it. found: (Y, X) in [0, 1].
    """
    box = largest_boxes(found[None].cpu(), THRESHOLD)[0]
    figure = Figure(figsize=(7, 3.8), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    pixels = plain(image.cpu(), preprocess)
    left, right = figure.subplots(1, 2)
    _draw(left, pixels, torch.ones_like(found.cpu()), box)
    _draw(right, pixels, found.cpu(), box)
    with lettered([title]) as (shown,):
        figure.suptitle(shown, fontsize=10, x=0.01, ha="left")
        figure.savefig(path)
    return tuple(box.tolist())


def plain(image: Tensor, preprocess: Mapping[str, Any]) -> Tensor:
    """The pixels (Y, X, 3) in [0, 1] of an image (C, Y, X) that was normalized."""
    mean = torch.tensor(preprocess.get("mean", (0.485, 0.456, 0.406))).view(-1, 1, 1)
    std = torch.tensor(preprocess.get("std", (0.229, 0.224, 0.225))).view(-1, 1, 1)
    return (image * std + mean).clamp(0, 1).permute(1, 2, 0).expand(-1, -1, 3)


def _draw(axis: Any, pixels: Tensor, light: Tensor, box: Tensor, truth: Tensor | None = None) -> None:
    """The picture, dark where the map is low, with boxes."""
    axis.set_axis_on()
    axis.set_xticks([])
    axis.set_yticks([])
    axis.imshow((pixels * (0.25 + 0.75 * light[:, :, None])).numpy(), interpolation="nearest")
    for corners, color in [(box, FOUND), *((t, TRUE) for t in (truth if truth is not None else ()))]:
        left, top, right, bottom = corners.tolist()
        axis.add_patch(
            Rectangle((left - 0.5, top - 0.5), right - left, bottom - top, fill=False, color=color, linewidth=2)
        )
