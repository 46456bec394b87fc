"""``detection check DATA``: everything that is wrong with a COCO data set, at once."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from detection.data.coco import Split
    from detection.data.coco_json import CocoFile, Findings

EVERYTHING = 10**9  # pictures are opened, however many there are
SHOWN = 20  # lines of one kind and split


def check(
    data: Annotated[Path, typer.Argument(help="Folder of a data set, or a COCO json.")],
    *,
    images: Annotated[Path | None, typer.Option(help="Folder of the pictures of a json (default: its own).")] = None,
    labels: Annotated[str, typer.Option(help="contiguous or category_id, as in the recipe.")] = "contiguous",
    turned: Annotated[str, typer.Option(help="auto, upright or stored, as in the recipe.")] = "auto",
) -> Iterator[str]:
    """Print everything that is wrong with a data set: records, sizes, EXIF, categories, duplicates, damaged pictures.

    Every picture is decoded. The exit code is 1 if anything is refused or repaired; remarks change nothing.

    Raises: ValueError if something is wrong, after all of it was printed; for a folder without a data set.
    """
    from detection.data.coco_json import Findings, inspect_coco

    if labels not in ("contiguous", "category_id"):
        raise ValueError(f"--labels must be contiguous or category_id, got {labels}")
    if turned not in ("auto", "upright", "stored"):
        raise ValueError(f"--turned must be auto, upright or stored, got {turned}")
    splits = _splits(data, images)
    wrong = 0
    files: dict[str, CocoFile] = {}
    for name, split in splits.items():
        yield f"{name or 'pictures'}: {split.json}"
        try:
            found = inspect_coco(split.json, split.folder, turned=turned, headers=EVERYTHING)
        except ValueError as error:
            wrong += 1
            yield f"  refused: {error}"
            continue
        files[name] = found
        objects = sum(len(picture.annotations) for picture in found.pictures)
        yield f"  {len(found.pictures)} pictures, {objects} objects, {len(found.categories)} categories"
        lines = Findings([*found.findings.refused, *_damaged(found)], found.findings.repaired, found.findings.remarks)
        lines.remarks.extend(_unlisted(found, split))
        wrong += len(lines.refused) + len(lines.repaired)
        yield from _said(lines)
    across = [*_categories(files, labels), *_leaks(files)]
    for line in across:
        yield f"across splits: {line}"
    wrong += len(across)
    if wrong:
        raise ValueError(f"{wrong} finding{'s' * (wrong > 1)} in {data}")
    yield "nothing is wrong"


def _splits(data: Path, images: Path | None) -> "dict[str, Split]":
    from detection.data.coco import Split, find_splits

    if data.is_file():
        return {"": Split("", data, images or data.parent)}
    if not data.is_dir():
        raise ValueError(f"{data} does not exist")
    splits = find_splits(data, divide=True)
    if not splits:
        raise ValueError(
            f"{data} holds no COCO data set: no train/_annotations.coco.json, no annotations/instances_train2017.json, "
            "not exactly one json"
        )
    return {"": splits["train"]} if splits["train" if "train" in splits else next(iter(splits))].part else splits


def _said(lines: "Findings") -> Iterator[str]:
    for kind in ("refused", "repaired", "remarks"):
        found = getattr(lines, kind)
        for line in found[:SHOWN]:
            yield f"  {'remark' if kind == 'remarks' else kind}: {line}"
        if len(found) > SHOWN:
            yield f"  {kind}: and {len(found) - SHOWN} more"


def _damaged(found: "CocoFile") -> Iterator[str]:
    from detection.data.coco import read_image

    for picture in found.pictures:
        try:
            if picture.path.is_file():
                read_image(picture.path)
        except (ValueError, OSError) as error:
            yield str(error)


def _unlisted(found: "CocoFile", split: "Split") -> Iterator[str]:
    from detection.data.coco import SUFFIXES

    listed = {picture.path.name for picture in found.pictures}
    files = sorted(file.name for file in split.folder.iterdir()) if split.folder.is_dir() else []
    extra = [name for name in files if Path(name).suffix.lower() in SUFFIXES and name not in listed]
    if extra:
        yield f"{len(extra)} pictures in {split.folder} are not in the json: {', '.join(map(repr, extra[:3]))}"


def _categories(files: "Mapping[str, CocoFile]", labels: str) -> Iterator[str]:
    from detection.data.coco import compare_categories

    if "train" not in files:
        if "" not in files:
            yield "there is no train split"
        return
    for name, found in files.items():
        problem, note = compare_categories(files["train"].categories, found.categories, labels)
        if problem or note:
            yield f"categories of {name} are not those of train: {problem or note}"


def _leaks(files: "Mapping[str, CocoFile]") -> Iterator[str]:
    """Pictures whose files are equal byte for byte."""
    places: dict[bytes, list[tuple[str, Path]]] = defaultdict(list)
    for name, found in files.items():
        for picture in found.pictures:
            if picture.path.is_file():
                places[hashlib.sha256(picture.path.read_bytes()).digest()].append((name, picture.path))
    twice = [place for place in places.values() if len(place) > 1]
    if twice:
        shown = " and ".join(str(path) for _, path in twice[0][:3])
        kinds = "in two splits" if any(len({name for name, _ in place}) > 1 for place in twice) else "of one split"
        yield f"{len(twice)} pictures {kinds} are the same file, such as {shown}"
