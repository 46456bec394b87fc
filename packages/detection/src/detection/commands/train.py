"""What ``detection train`` adds to the engine's: a data set of your own, and what is drawn at the end of a run."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import nn


def train_settings(
    *,
    data: Annotated[
        Path | None,
        typer.Option("--data", "-d", help="Your data set, for own_pictures, the default, and plain_detr_coco."),
    ] = None,
) -> Iterator[str]:
    """Where the data are, and how many classes they have.

    Raises: ValueError for a folder without a data set, or a json whose categories cannot be read.
    """
    if data is None:
        return
    from detection.data.coco import categories_of, find_split

    training = find_split(data, "train", divide=True)
    yield f"data_root={str(data)!r}"
    yield f"num_classes={len(categories_of(training.json))}"
    yield "labels='contiguous'"


def draw_predictions(model: nn.Module, loader: Iterable[dict[str, Any]], path: Path) -> Sequence[str]:
    """Test pictures beside what is found in them; see `detection.pictures.end_of_run`."""
    from detection.pictures.end_of_run import draw_predictions

    return draw_predictions(model, loader, path)
