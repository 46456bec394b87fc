"""``--data`` of ``detection train``: what a recipe has to know about a data set."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from detection.data.coco import categories_of, find_split


def train_settings(
    *,
    data: Annotated[
        Path | None,
        typer.Option("--data", "-d", help="Your data set, for own_pictures and plain_detr_coco."),
    ] = None,
) -> Iterator[str]:
    """Where the data are, and how many classes they have.

    Raises: ValueError for a folder without a data set, or a json whose categories cannot be read.
    """
    if data is None:
        return
    training = find_split(data, "train", divide=True)
    yield f"data_root={str(data)!r}"
    yield f"num_classes={len(categories_of(training.json))}"
    yield "labels='contiguous'"
