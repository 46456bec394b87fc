"""What ``train`` knows of this package beyond the shared options: where your pictures are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from vision_models.data.imagefolder import class_names


def train_settings(
    *,
    data: Annotated[
        Path | None,
        typer.Option("--data", "-d", help="Your pictures, a folder for each class (recipes pictures, *_imagenet)."),
    ] = None,
) -> Iterator[str]:
    """``data_root`` and the number of ``classes`` found there.

    Raises:
        ValueError: no folder, or fewer than two classes in it.
    """
    if data is not None:
        yield f"data_root={str(data)!r}"
        yield f"classes={len(class_names(data))}"
