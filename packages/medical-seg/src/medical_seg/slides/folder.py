"""A data set of slides: files found and checked, labels from a table or from the files, cases, merged classes."""

import csv
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from attn_core.catalog import did_you_mean
from attn_core.engine.inputs import find_inputs
from medical_seg.slides.files import ENDINGS, Slide, read_headers, with_places

_LOGGER = logging.getLogger(__name__)
SHOWN = 5  # names in a message
COLUMNS = {"slide": ("slide_id", "slide"), "label": ("label",), "case": ("case_id", "patient_id")}
PART_COLUMNS = ("split_info", "split")


@dataclass(frozen=True)
class SlideSet:
    """Slides with labels.

    Attributes:
        slides: sorted by name.
        classes: names in the order of the network's outputs.
        labels: slide → class number.
        cases: slide → patient; the slide itself where no table says.
        parts: slide → ``train``, ``val`` or ``test``, if the table says.
    """

    slides: list[Slide]
    classes: list[str]
    labels: dict[str, int]
    cases: dict[str, str]
    parts: dict[str, str] = field(default_factory=dict)

    @property
    def channels(self) -> int:
        """Features of an instance, the same in all slides."""
        return self.slides[0].channels

    def counted(self) -> str:
        """How many slides each class has, in words."""
        counts = [sum(label == k for label in self.labels.values()) for k in range(len(self.classes))]
        return ", ".join(f"{name} {count}" for name, count in zip(self.classes, counts, strict=True))


@dataclass(frozen=True)
class Row:
    """What a table says of a slide."""

    label: str
    case: str
    part: str


def find_slides(inputs: Sequence[Path], out: Path | None = None) -> list[Slide]:
    """Slides of files and of folders at any depth, sorted by name; coordinates are joined to features of that name.

    Args:
        out: where results go; it is not searched.

    Raises: ValueError, with the names of the files: one that cannot be used; a slide in two files that do not go
        together; slides of different encoders.
    """
    found: dict[str, Slide] = {}
    places: dict[str, Path] = {}
    for item in find_inputs(inputs, ENDINGS, what="features", out=out):
        name = item.path.stem
        slides = read_headers(item.path, name)
        if not slides:
            places[name] = item.path
        for slide in slides:
            other = found.get(slide.name)
            found[slide.name] = slide if other is None else _joined(other, slide)
    if not found:
        raise ValueError(f"{inputs[0]}: its files hold coordinates and no features")
    for name, path in places.items():
        if name in found and found[name].placed is None:
            found[name] = with_places(found[name], path)
    slides = [found[name] for name in sorted(found)]
    for slide in slides:
        if slide.channels != slides[0].channels:
            raise ValueError(
                f"{slide.path}: slide {slide.name!r} has {slide.channels} features an instance, "
                f"{slides[0].path} has {slides[0].channels}: they are of different encoders"
            )
    return slides


def _joined(first: Slide, second: Slide) -> Slide:
    """CLAM writes a slide twice, ``h5_files/x.h5`` and ``pt_files/x.pt``: the one with coordinates serves."""
    pair = sorted((first, second), key=_is_tensor)
    twins = [_is_tensor(slide) for slide in pair] == [False, True]
    shapes = [(slide.instances, slide.channels) for slide in pair]
    if not twins or shapes[0] != shapes[1]:
        told = "" if shapes[0] == shapes[1] else f" with {shapes[0]} and {shapes[1]} instances and features"
        raise ValueError(f"{second.path}: slide {second.name!r} stands in {first.path}, too{told}; give one of them")
    return pair[0]


def _is_tensor(slide: Slide) -> bool:
    return slide.path.suffix.lower() in (".pt", ".pth")


def open_slides(data: Sequence[Path], *, table: Path | None = None, merge: Sequence[Sequence[str]] = ()) -> SlideSet:
    """Slides and labels of a data set.

    Args:
        data: files and folders.
        table: csv with ``slide_id`` and ``label``, and where there are ``case_id`` and ``split_info``; None takes the
            one csv of this kind that lies in a folder of ``data``, or the labels that files hold.
        merge: labels that become one class each; all labels must be named then.

    Raises: ValueError: what `find_slides` refuses; a table that cannot be used, or that the files contradict; no
        labels; fewer than two classes.
    """
    slides = find_slides(data)
    source = table or _table_of(data)
    rows = {} if source is None else read_table(source)
    names = _known_as([slide.name for slide in slides], rows)
    if source is not None:
        _tell(f"{source} names no label of", [slide.name for slide in slides if slide.name not in names])
        _tell(f"no features were found of slides in {source}:", sorted(rows.keys() - set(names.values())))
        kept = [slide for slide in slides if slide.name in names]
        if not kept:
            example = next(iter(rows), "none")
            raise ValueError(f"{source}: names none of the {len(slides)} slides (there {example!r}, "
                             f"here {slides[0].name!r})")  # fmt: skip
        for slide in kept:
            said = rows[names[slide.name]].label
            if slide.label is not None and slide.label != said:
                raise ValueError(
                    f"{slide.path}: slide {slide.name!r} has the label {slide.label!r}, in {source} it is {said!r}"
                )
        slides, texts = kept, [rows[names[slide.name]].label for slide in kept]
    else:
        texts = []
        for slide in slides:
            if slide.label is None:
                raise ValueError(f"{slide.path}: slide {slide.name!r} has no label; give a csv with --labels")
            texts.append(slide.label)
    classes, numbers = _classes(texts, merge)
    said = {slide.name: rows[names[slide.name]] for slide in slides} if source is not None else {}
    return SlideSet(
        slides=slides,
        classes=classes,
        labels=dict(zip((slide.name for slide in slides), numbers, strict=True)),
        cases={slide.name: (said[slide.name].case if said else "") or slide.name for slide in slides},
        parts={name: row.part for name, row in said.items() if row.part},
    )


def read_table(path: Path) -> dict[str, Row]:
    """Slide → row of a csv, separated by commas, semicolons or tabs.

    Raises: ValueError if it cannot be read, lacks a column, or gives a slide no label or two; the message names
        the row.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable csv ({getattr(error, 'strerror', None) or error})") from error
    header = next((line for line in text.splitlines() if line.strip()), "")
    reader = csv.DictReader(text.splitlines(), delimiter=max(",;\t", key=header.count))
    there = [name.strip().lower() for name in reader.fieldnames or ()]
    reader.fieldnames = there
    columns = {what: next((name for name in names if name in there), None) for what, names in COLUMNS.items()}
    for what in ("slide", "label"):
        if columns[what] is None:
            raise ValueError(f"{path}: has no column {COLUMNS[what][0]}; there are {', '.join(there) or 'none'}")
    part = next((name for name in PART_COLUMNS if name in there), None)
    rows: dict[str, Row] = {}
    try:
        for number, line in enumerate(reader, 2):
            cells = {name: (value or "").strip() for name, value in line.items() if isinstance(name, str)}
            slide, label = cells[columns["slide"] or ""], cells[columns["label"] or ""]
            if not slide and not label:
                continue
            if not slide or not label:
                raise ValueError(f"{path}: row {number} has no {'label' if slide else 'slide'}")
            row = Row(label, cells.get(columns["case"] or "", ""), cells.get(part or "", ""))
            if rows.setdefault(slide, row) != row:
                raise ValueError(f"{path}: row {number} says another thing of slide {slide!r} than a row above")
    except csv.Error as error:
        raise ValueError(f"{path}: not a readable csv ({error})") from error
    return rows


def _table_of(data: Sequence[Path]) -> Path | None:
    """The one csv of a folder that names slides and labels."""
    tables = []
    for folder in (path for path in data if path.is_dir()):
        for file in sorted(folder.glob("*.csv")):
            head = file.read_text(encoding="utf-8-sig", errors="replace").partition("\n")[0].lower()
            if "slide" in head and "label" in head:
                tables.append(file)
    if len(tables) > 1:
        raise ValueError(f"{tables[0].parent}: {len(tables)} csv files name slides and labels ({tables[0].name}, "
                         f"{tables[1].name}); choose one with --labels")  # fmt: skip
    return tables[0] if tables else None


def _known_as(slides: Iterable[str], rows: Mapping[str, Row]) -> dict[str, str]:
    """Slide → its name in a table, where endings of pictures (``.svs``, ``.tif``) may follow."""
    bare = {name.rpartition(".")[0]: name for name in rows if "." in name}
    return {name: name if name in rows else bare[name] for name in slides if name in rows or name in bare}


def _classes(texts: Sequence[str], merge: Sequence[Sequence[str]]) -> tuple[list[str], list[int]]:
    """Names of classes, numbers in numerical order, and the class of each label."""
    there = sorted(set(texts), key=lambda text: (0, int(text), "") if text.lstrip("-").isdigit() else (1, 0, text))
    groups = [list(map(str, group)) for group in merge] or [[text] for text in there]
    of = {label: k for k, group in enumerate(groups) for label in group}
    if len(of) != sum(map(len, groups)):
        raise ValueError(f"--merge: a label stands in two groups: {groups}")
    for text in there:
        if text not in of:
            raise ValueError(f"--merge: no group has the label {text!r}{did_you_mean(text, of)}")
    if len(groups) < 2:
        raise ValueError(f"slides of one class, {', '.join(there)}: at least two are needed")
    return ["+".join(group) for group in groups], [of[text] for text in texts]


def _tell(what: str, names: Sequence[str]) -> None:
    if names:
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        _LOGGER.warning("%s %s%s; left out", what, ", ".join(names[:SHOWN]), more)
