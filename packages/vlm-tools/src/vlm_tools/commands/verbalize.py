"""``vlm-tools verbalize``: maps of explain and ground, or attributions of tokens, in words."""

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

SIDE = 144  # pixels of the picture on which a map is read


def verbalize(
    file: Annotated[Path, typer.Argument(help="An .npz of explain or ground; or .json, .jsonl: tokens, attributions.")],
    width: Annotated[int, typer.Option(help="Tokens that a mask spans.")] = 5,
    metric: Annotated[str, typer.Option(help="mean, quantile or variance: what a span must exceed.")] = "mean",
    value: Annotated[float | None, typer.Option(help="Share of tokens (mean), or factor.")] = None,
    sign: Annotated[str | None, typer.Option(help="+ or -: only tokens for or against the prediction.")] = None,
    official: Annotated[bool, typer.Option("--official", help="As the official code, faults included.")] = False,
    most: Annotated[int, typer.Option(help="Parts of a picture to name.")] = 2,
) -> Iterator[str]:
    """Say where a map lies on its picture, or which words of a text matter."""
    if file.suffix.lower() == ".npz":
        yield from _of_maps(file, most)
        return
    from vlm_tools.readings import verbalization

    options: dict[str, Any] = {"width": width, "metric": metric, "value": value, "sign": sign, "official": official}
    for tokens, attributions in _texts(file):
        yield verbalization.verbalize(tokens, attributions, **options)


def _of_maps(file: Path, most: int) -> Iterator[str]:
    import torch

    from vlm_tools.readings.explain import on_picture
    from vlm_tools.readings.verbalization import verbalize_regions

    try:
        with np.load(file) as stored:
            heat, boxes = (torch.from_numpy(stored[name]).float() for name in ("heat", "boxes"))
            words = stored["words"].tolist() if "words" in stored else None
    except (KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile):
        raise ValueError(f"{file}: no map of explain or ground (heat, boxes)") from None
    heat = heat[None] if heat.dim() == 1 else heat
    if heat.dim() != 2 or boxes.shape != (heat.shape[1], 4) or (words is not None and len(words) != len(heat)):
        raise ValueError(f"{file}: heat {tuple(heat.shape)} and boxes {tuple(boxes.shape)} do not fit one another")
    for number, row in enumerate(heat):
        text = verbalize_regions(on_picture(row, boxes, (SIDE, SIDE)).numpy(), most=most)
        if words is None:
            yield text
        elif words[number].strip():
            yield f"{words[number].strip()}: {text}"


def _texts(file: Path) -> Iterator[tuple[list[str], list[float]]]:
    """(tokens, attributions) of every record."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{file}: neither an .npz nor a text in UTF-8") from None
    try:
        if file.suffix.lower() == ".jsonl":
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            records = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f'{file}: no JSON; write {{"tokens": [...], "attributions": [...]}}') from None
    records = records if isinstance(records, list) else [records]
    if not records:
        raise ValueError(f"{file}: there is no record")
    for number, record in enumerate(records):
        tokens = record.get("tokens", record.get("input_ids")) if isinstance(record, dict) else None
        attributions = record.get("attributions") if isinstance(record, dict) else None
        named = isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)
        scored = isinstance(attributions, list) and all(type(score) in (int, float) for score in attributions)
        if not (isinstance(tokens, list) and named and isinstance(attributions, list) and scored):
            raise ValueError(f"{file}: record {number} needs tokens (words) and attributions (numbers)")
        yield tokens, attributions
