"""What a network makes from noise: samples of each class below pictures of a part."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from attn_core.lettering import lettered
from vision_models.pictures.localization import plain

SHOWN = 10  # classes
SAMPLES = 5  # of each


@torch.no_grad()
def report(model: nn.Module, loader: Iterable[dict[str, Any]], path: Path) -> list[str]:
    """A column for each class: its first picture of a part, framed, and samples; gives further files: none.

    Args:
        model: a ``DenoisingTask`` in eval mode.
        loader: of a data set whose ``metainfo`` holds ``classes`` and ``preprocess``.
        path: of the picture.
    """
    info = loader.dataset.metainfo  # pyright: ignore[reportAttributeAccessIssue]
    device = next(model.parameters()).device
    classes = [str(name) for name in info["classes"]][:SHOWN]
    truth: dict[int, Tensor] = {}
    for batch in loader:
        for image, label in zip(batch["image"], batch["label"].tolist(), strict=True):
            truth.setdefault(label, image)
        if len(truth) >= len(classes):
            break
    label = torch.arange(len(classes), device=device).repeat(SAMPLES)
    made = model.samples(label).cpu().unflatten(0, (SAMPLES, len(classes)))  # pyright: ignore[reportCallIssue]
    with lettered(classes) as names:
        figure = Figure(figsize=(1.1 * len(classes), 1.2 * (SAMPLES + 1) + 0.4), dpi=100, layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle("a picture of each class (framed), and samples below", fontsize=11, x=0.01, ha="left")
        grid = figure.subplots(SAMPLES + 1, len(classes), squeeze=False)
        for axis in grid.ravel():
            axis.set_axis_off()
        for column, name in enumerate(names):
            pictures = [truth.get(column), *made[:, column]]
            for axis, picture in zip(grid[:, column], pictures, strict=True):
                if picture is None:  # the part has none of this class
                    continue
                axis.imshow(plain(picture, info["preprocess"]).numpy(), interpolation="nearest")
                axis.set_axis_on()
                axis.set_xticks([])
                axis.set_yticks([])
                axis.spines[:].set_visible(False)
            grid[0, column].set_title(name[:13], fontsize=9)
            grid[0, column].spines[:].set(visible=True, color="#f08c00", linewidth=2)
        figure.savefig(path)
    return []
