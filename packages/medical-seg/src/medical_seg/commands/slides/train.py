"""Options of ``slides train`` for features of one's own."""

from pathlib import Path
from typing import Annotated, Any

import typer

from medical_seg.commands.options import named_values


def train_settings(
    *,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data", "-d", help="Features: files or folders (repeatable); without a name the recipe is slides."
        ),
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="csv of slide_id, label, case_id (default: the one in the folder, or the files')."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="acmil_ga (default), acmil_mha, abmil, mean_pooling, max_pooling."),
    ] = None,
    split: Annotated[int, typer.Option(help="1 to 5: which fifth tests.")] = 1,
    splits: Annotated[
        Path | None, typer.Option(help="Your own: split_<n>.json, splits_<n-1>.csv, or a folder of them.")
    ] = None,
    merge: Annotated[
        list[str] | None, typer.Option(metavar="A,B", help="Labels that become one class (repeat for each class).")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Constructor argument of the network (repeatable).")
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Default: the recipe's.")] = None,
) -> list[str]:
    """Settings of the recipe ``slides`` for features, which are checked before anything runs."""
    from medical_seg.slides.bags import SlideBags
    from medical_seg.slides.folder import open_slides

    if not data:
        if split != 1 or any(value is not None for value in (labels, model, splits, merge, option, epochs)):
            raise ValueError(
                "train: --labels, --model, --split, --splits, --merge, --option and --epochs need --data FOLDER"
            )
        return []
    groups = [[label.strip() for label in group.split(",")] for group in merge or []]
    found = open_slides(data, table=labels, merge=groups)
    options = named_values(option or [])
    settings: dict[str, Any] = {
        "data": [str(path) for path in data],
        "split": split,
        "in_channels": found.channels,
        "classes": found.classes,
    }
    given = {
        "labels": None if labels is None else str(labels),
        "splits": None if splits is None else str(splits),
        "merge": groups or None,
        "network": model,
        "options": options or None,
        "epochs": epochs,
    }
    settings |= {name: value for name, value in given.items() if value is not None}
    where: Any = {name: settings[name] for name in ("data", "labels", "split", "splits", "merge") if name in settings}
    sizes = [len(SlideBags(part=part, **where)) for part in ("train", "val", "test")]
    typer.echo(f"{len(found.slides)} slides of {found.channels} features an instance: {found.counted()}")
    typer.echo(f"split {split}: train {sizes[0]}, val {sizes[1]}, test {sizes[2]} slides")
    return [f"{key}={value!r}" if not isinstance(value, str) else f"{key}={value}" for key, value in settings.items()]
