"""Five splits of slides into training, validation and test: from files of others, or made here."""

import csv
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from medical_seg.slides.folder import SlideSet

_LOGGER = logging.getLogger(__name__)
SPLITS = 5
PARTS = ("train", "val", "test")
Split = dict[str, list[str]]


def make_split(slides: SlideSet, number: int) -> Split:
    """Split 1 to 5 of a data set: three fifths train, one validates, one tests; the five tests are the whole set.

    Slides of one case stay together, and classes are shared out evenly. The splits depend on the names of cases alone,
    not on their order.

    Raises: ValueError for a number beyond 1 to 5, or a class of which a split would train on no slide.
    """
    _check_number(number)
    members: dict[str, list[str]] = {}
    for slide in slides.slides:
        members.setdefault(slides.cases[slide.name], []).append(slide.name)
    label = {case: max(slides.labels[name] for name in names) for case, names in members.items()}
    order = sorted(members, key=lambda case: (label[case], hashlib.sha256(case.encode()).hexdigest()))
    fold = {case: place % SPLITS for place, case in enumerate(order)}
    parts = {(number - 1) % SPLITS: "test", number % SPLITS: "val"}
    found: Split = {part: [] for part in PARTS}
    for case, names in members.items():
        found[parts.get(fold[case], "train")] += names
    found = {part: sorted(names) for part, names in found.items()}
    trained = {slides.labels[name] for name in found["train"]}
    for k, name in enumerate(slides.classes):
        if k not in trained:
            raise ValueError(f"split {number} trains on no slide of class {name}; give splits with --splits, or more "
                             "slides of that class")  # fmt: skip
    return found


def read_split(path: Path, slides: SlideSet, number: int) -> Split:
    """A split of others: ACMIL's ``split_<n>.json``, CLAM's ``splits_<n - 1>.csv``, or a folder of five such files.

    Raises: ValueError: no such file, one that is no split, slides that are not in the data set or stand in two parts.
    """
    _check_number(number)
    file = path
    if path.is_dir():
        choices = [path / f"split_{number}.json", path / f"splits_{number - 1}.csv"]
        there = [choice for choice in choices if choice.is_file()]
        if not there:
            raise ValueError(f"{path}: holds neither {choices[0].name} nor {choices[1].name}")
        file = there[0]
    try:
        found = _from_json(file) if file.suffix.lower() == ".json" else _from_csv(file)
    except (OSError, ValueError, csv.Error) as error:
        text = str(error)
        raise ValueError(text if text.startswith(str(file)) else f"{file}: not a split file ({text})") from error
    return _checked(file, found, slides)


def split_of_table(slides: SlideSet) -> Split:
    """What the column ``split_info`` of the table says.

    Raises: ValueError for a word other than train, val and test, or a part without slides.
    """
    found: Split = {part: [] for part in PARTS}
    words = {"training": "train", "validation": "val", "valid": "val", "testing": "test"}
    for name, said in slides.parts.items():
        part = words.get(said.lower(), said.lower())
        if part not in found:
            raise ValueError(f"split_info of slide {name!r} is {said!r}; expected train, val or test")
        found[part].append(name)
    return _checked(Path("split_info"), found, slides)


def _check_number(number: int) -> None:
    if not 1 <= number <= SPLITS:
        raise ValueError(f"--split: there are splits 1 to {SPLITS}, got {number}")


def _checked(file: Path, found: Split, slides: SlideSet) -> Split:
    names = {slide.name for slide in slides.slides}
    seen: dict[str, str] = {}
    for part in PARTS:
        if not found[part]:
            raise ValueError(f"{file}: no slide is in the part {part!r}")
        for name in found[part]:
            if name not in names:
                raise ValueError(f"{file}: slide {name!r} of the part {part!r} is not in the data set")
            if name in seen:
                raise ValueError(f"{file}: slide {name!r} stands in {seen[name]!r} and in {part!r}")
            seen[name] = part
    shared = _shared_case(seen, slides.cases)
    if shared:
        _LOGGER.warning("%s: slides of case %r stand in several parts: the test is not of other patients", file, shared)
    return {part: sorted(found[part]) for part in PARTS}


def _shared_case(parts: Mapping[str, str], cases: Mapping[str, str]) -> str:
    first: dict[str, str] = {}
    return next((cases[n] for n, part in parts.items() if first.setdefault(cases[n], part) != part), "")


def _from_json(file: Path) -> Split:
    held = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(held, dict):
        raise ValueError(f"{file}: expected an object with {', '.join(f'{part}_names' for part in PARTS)}")
    found: Split = {}
    for part in PARTS:
        names = held.get(f"{part}_names", held.get(part))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{file}: {part}_names must be a list of slides, got {type(names).__name__}")
        found[part] = names
    return found


def _from_csv(file: Path) -> Split:
    rows = list(csv.DictReader(file.read_text(encoding="utf-8-sig").splitlines()))
    there: Sequence[str] = list(rows[0]) if rows else []
    for part in PARTS:
        if part not in there:
            raise ValueError(f"{file}: has no column {part}; there are {', '.join(filter(None, there)) or 'none'}")
    return {part: [row[part].strip() for row in rows if (row[part] or "").strip()] for part in PARTS}
