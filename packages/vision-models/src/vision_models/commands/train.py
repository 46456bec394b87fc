"""What ``train`` knows of this package beyond the shared options: where your pictures are, what a run draws."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn


def train_settings(
    *,
    data: Annotated[
        Path | None,
        typer.Option(
            "--data",
            "-d",
            help="Your pictures, a folder for each class (recipes pictures, the default, and *_imagenet).",
        ),
    ] = None,
) -> Iterator[str]:
    """``data_root`` and the number of ``classes`` found there.

    Raises:
        ValueError: no folder, or fewer than two classes in it.
    """
    from vision_models.data.imagefolder import class_names

    if data is not None:
        yield f"data_root={str(data)!r}"
        yield f"classes={len(class_names(data))}"


def draw_predictions(model: nn.Module, loader: Iterable[dict[str, Any]], path: Path) -> Sequence[str] | None:
    """Test pictures with what is found in them, and the table of all classes; see `vision_models.pictures.report`.

    Of a localization task: the maps and boxes that are found, with the true ones. Of a denoising task: samples.
    """
    from vision_models.localization.task import LocalizationTask
    from vision_models.pictures import localization, report, samples
    from vision_models.tasks.denoising import DenoisingTask

    if isinstance(model, DenoisingTask):
        return samples.report(model, loader, path)
    return (localization if isinstance(model, LocalizationTask) else report).report(model, loader, path)
