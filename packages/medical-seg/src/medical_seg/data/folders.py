"""Folders of cases: nnU-Net's raw layout, and pictures beside their masks; found, checked, split.

nnU-Net v2 (https://github.com/MIC-DKFZ/nnUNet, documentation/dataset_format.md)::

    Dataset001_Name/dataset.json  imagesTr/ID_0000.nii.gz, ID_0001.nii.gz …  labelsTr/ID.nii.gz  imagesTs/

Pictures::

    name/images/ID.png  masks/ID.png        grey or RGB; pixels of masks are class numbers
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medical_seg.data.volumes import (
    PICTURES,
    SUFFIXES,
    Volume,
    read_labels,
    read_volume,
    require_finite,
    require_same_grid,
    suffix,
)

FOLDS = 5


@dataclass(frozen=True)
class Case:
    """One patient or picture: a file per channel, and its labels if there are any."""

    name: str
    images: tuple[Path, ...]
    label: Path | None


@dataclass(frozen=True)
class Folder:
    """A data set on disk.

    Attributes:
        path: Its folder.
        channels: Names of the channels.
        classes: Names of the classes, background first; of regions all but the background.
        regions: Labels that belong to each of the classes, which may overlap; None if every class is one label.
        order: Label that each region is written as, later ones over earlier ones; empty without regions.
        ignore: The label that marks voxels nobody has labelled, or None.
        cases: Sorted by name.
        tolerance: mm that image and labels of a case may lie apart, as of `require_same_grid`.
    """

    path: Path
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    regions: tuple[tuple[int, ...], ...] | None
    order: tuple[int, ...]
    ignore: int | None
    cases: tuple[Case, ...]
    tolerance: float | None = None

    @property
    def is_pictures(self) -> bool:
        """Whether every image is one file with all its channels, beside its mask."""
        return not (self.path / "dataset.json").is_file()

    @property
    def labels(self) -> int:
        """How many labels there are with the background and without the ignored one."""
        return len(self.classes) if self.regions is None else 1 + len({k for region in self.regions for k in region})


def open_folder(path: Path, *, tolerance: float | None = None) -> Folder:
    """Find the cases of a folder; files are listed, not read.

    Args:
        tolerance: mm that image and labels of a case may lie apart; None for a tenth of a voxel.

    Raises: ValueError, naming the file or folder, for a layout that is neither of the two, a broken dataset.json, a
    case without all its channels or without labels, two files for one case.
    """
    if tolerance is not None and not 0 <= tolerance < float("inf"):
        raise ValueError(f"--geometry-tolerance: expected mm of 0 or more, got {tolerance}")
    if (path / "dataset.json").is_file():
        return replace(_open_nnunet(path), tolerance=tolerance)
    if (path / "images").is_dir() and (path / "masks").is_dir():
        return _open_pictures(path)
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder")
    raise ValueError(f"{path}: holds neither dataset.json (nnU-Net's layout) nor images/ and masks/ (pictures)")


def group_cases(files: Sequence[Path], channels: int | None, names: Sequence[str] | None = None) -> list[Case]:
    """Images without labels, by case: ``ID_0000.nii.gz`` … , or any names if there is one channel.

    Args:
        files: of images.
        channels: how many a case has. None: every file is a case of its own, as IMG_0001.jpg of a camera is.
        names: of the files without ending, where they are not those of ``files``.

    Raises: ValueError for a case with missing or too many channels, or two files of one name.
    """
    cases: dict[str, dict[int, Path]] = {}
    for file, whole in zip(files, names or [stem(file) for file in files], strict=True):
        match = re.fullmatch(r"(.+)_(\d{4})", whole) if channels is not None else None
        name, channel = (match[1], int(match[2])) if match else (whole, 0)
        if channel in cases.setdefault(name, {}):
            raise ValueError(
                f"{file}: duplicate of {cases[name][channel].name}, both are channel {channel} of {name!r}"
            )
        cases[name][channel] = file
    for name, found in cases.items():
        # Pictures and 4-channel formats hold all channels in one file.
        if len(found) == 1 and suffix(next(iter(found.values()))) in PICTURES:
            continue
        wanted = range(channels or 1)
        for channel in wanted:
            if channel not in found:
                there = next(iter(found.values()))
                raise ValueError(
                    f"{there}: case {name!r} lacks channel {channel} of {len(wanted)} ({name}_{channel:04d})"
                )
        if extra := [number for number in found if number not in wanted]:
            raise ValueError(f"{found[extra[0]]}: case {name!r} has more than {len(wanted)} channels")
    return [Case(name, tuple(found[c] for c in sorted(found)), None) for name, found in sorted(cases.items())]


def five_folds(names: Sequence[str]) -> list[dict[str, list[str]]]:
    """nnU-Net's default folds: sorted names, scikit-learn's ``KFold(5, shuffle=True, random_state=12345)``.

    Raises: ValueError for fewer than five names.
    """
    if len(names) < FOLDS:
        raise ValueError(
            f"five_folds: {len(names)} cases do not fill {FOLDS} folds; train on all with --fold all, or write "
            "splits_final.json"
        )
    ordered = np.array(sorted(names))
    shuffled = np.arange(len(ordered))
    np.random.RandomState(12345).shuffle(shuffled)
    parts = np.array_split(shuffled, FOLDS)
    return [
        {"train": ordered[np.setdiff1d(shuffled, part)].tolist(), "val": ordered[np.sort(part)].tolist()}
        for part in parts
    ]


def read_folds(folder: Folder) -> list[dict[str, list[str]]]:
    """``splits_final.json`` of the folder if it has one, else :func:`five_folds`.

    Raises: ValueError if the file names unknown cases or one case on both sides.
    """
    names = [case.name for case in folder.cases]
    file = folder.path / "splits_final.json"
    if not file.is_file():
        return five_folds(names)
    try:
        folds = json.loads(file.read_text(encoding="utf-8-sig"))
        pairs = [(list(map(str, fold["train"])), list(map(str, fold["val"]))) for fold in folds]
    except (ValueError, KeyError, TypeError, RecursionError, OSError):
        raise ValueError(f"{file}: expected a list of {{'train': [...], 'val': [...]}}") from None
    for number, (train, val) in enumerate(pairs):
        for name in (*train, *val):
            if name not in names:
                raise ValueError(f"{file}: fold {number} names the unknown case {name!r}")
        if not train or not val:
            raise ValueError(f"{file}: fold {number} has no case in {'val' if train else 'train'}")
        if both := set(train) & set(val):
            raise ValueError(f"{file}: fold {number} has {min(both)!r} in train and in val")
    return [{"train": train, "val": val} for train, val in pairs]


def read_case(folder: Folder, case: Case) -> tuple[Volume, np.ndarray]:
    """Image and labels (Z, Y, X) of a case, checked.

    A mask without foreground is a case as any other: a healthy control.

    Raises: ValueError, naming the file: other grid or place, NaN or infinity, labels that are no integers or no
    classes.
    """
    image = read_volume(case.images, tolerance=folder.tolerance)
    if len(image.data) != len(folder.channels):
        raise ValueError(f"{image.path}: {len(image.data)} channels, the data set has {len(folder.channels)}")
    require_finite(image)
    if case.label is None:
        raise ValueError(f"{image.path}: case {case.name!r} has no label")
    mask = read_labels(case.label)
    require_same_grid(image, mask, folder.tolerance)
    values = mask.data[0]
    found = np.unique(values)
    known = {*range(folder.labels)} | ({folder.ignore} if folder.ignore is not None else set())
    if unknown := [int(value) for value in found if int(value) not in known]:
        raise ValueError(
            f"{case.label}: label {unknown[0]} is no class; there are {', '.join(map(str, sorted(known)))}"
        )
    return image, values.astype(np.int16)


def problems(folder: Folder) -> Iterator[str]:
    """Every case that :func:`read_case` refuses, one line each."""
    for case in folder.cases:
        try:
            read_case(folder, case)
        except ValueError as error:
            yield str(error)


def _open_nnunet(path: Path) -> Folder:
    file = path / "dataset.json"
    about = _read_json(file)
    channel_names, labels, ending = about["channel_names"], about["labels"], about["file_ending"].lower()
    if not channel_names or not all(isinstance(name, str) for name in channel_names.values()):
        raise ValueError(f"{file}: channel_names must be names by number, got {_short(channel_names)}")
    if sorted(channel_names) != sorted(map(str, range(len(channel_names)))):
        raise ValueError(f"{file}: channel_names must be numbered 0, 1, 2, …, got {_short(list(channel_names))}")
    labels = dict(labels)
    ignore = labels.pop("ignore", None)
    given = {name: value if isinstance(value, list) else [value] for name, value in labels.items()}
    for value in (number for numbers in given.values() for number in numbers):
        if type(value) is not int:
            raise ValueError(f"{file}: labels must be numbers or lists of numbers, got {_short(value)}")
    numbers = sorted({number for value in given.values() for number in value})
    if numbers != list(range(len(numbers))) or given.get("background") != [0] or len(numbers) < 2:
        raise ValueError(f"{file}: labels must be background: 0 and then 1, 2, … without gaps, got {_short(numbers)}")
    if ignore is not None and (type(ignore) is not int or ignore != len(numbers)):
        raise ValueError(f"{file}: ignore must be the highest label, {len(numbers)}, got {_short(ignore)}")
    regions, order = None, ()
    if any(isinstance(value, list) for value in labels.values()):
        given.pop("background")
        regions = tuple(tuple(value) for value in given.values())
        order = about.get("regions_class_order", ())
        order = tuple(order) if isinstance(order, list) and all(type(k) is int for k in order) else ()
        if len(order) != len(regions) or not set(order) <= set(numbers[1:]):
            raise ValueError(
                f"{file}: regions_class_order must name the label that each of the {len(regions)} regions is "
                f"written as, got {_short(about.get('regions_class_order'))}"
            )
        classes = tuple(given)
    else:
        if len(set(labels.values())) != len(labels):
            raise ValueError(f"{file}: two classes have one label, got {_short(labels)}")
        classes = tuple(sorted(labels, key=labels.__getitem__))
    if ending not in SUFFIXES:
        raise ValueError(f"{file}: file_ending {_short(ending)} is not one of {', '.join(SUFFIXES)}")
    channels = tuple(channel_names[str(k)] for k in range(len(channel_names)))
    found = group_cases(_files(path / "imagesTr", (ending,)), len(channels))
    cases = _with_labels(found, path / "labelsTr", (ending,))
    names = {case.name for case in cases}
    for label in _files(path / "labelsTr", (ending,)):
        if stem(label) not in names:
            raise ValueError(f"{label}: there is no image of this case in imagesTr")
    return Folder(path, channels, classes, regions, order, ignore, cases)


def _read_json(file: Path) -> dict[str, Any]:
    """nnU-Net's dataset.json, as far as types go."""
    try:
        about = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{file}: not valid JSON ({' '.join(str(error).split())[:160]})") from None
    if not isinstance(about, dict):
        raise ValueError(f"{file}: expected an object with channel_names, labels, file_ending, got {_short(about)}")
    for key, kind in (("channel_names", dict), ("labels", dict), ("file_ending", str)):
        if key not in about:
            raise ValueError(f"{file}: {key!r} is missing")
        if not isinstance(about[key], kind):
            what = "an object" if kind is dict else "text"
            raise ValueError(f"{file}: {key} must be {what}, got {_short(about[key])}")
    return about


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _open_pictures(path: Path) -> Folder:
    images = _files(path / "images", PICTURES)
    cases = _with_labels(group_cases(images, None), path / "masks", PICTURES)
    first = read_volume(cases[0].images)
    highest = max(int(read_labels(case.label).data.max()) for case in cases if case.label)
    if highest > 31:
        raise ValueError(
            f"{path / 'masks'}: the highest grey level is {highest}; masks hold class numbers 0, 1, 2, …, "
            "divide grey levels such as 0 and 255 first"
        )
    channels = ("grey",) if len(first.data) == 1 else ("red", "green", "blue")
    classes = ("background", *(f"class_{k}" for k in range(1, max(highest, 1) + 1)))
    return Folder(path, channels, classes, None, (), None, cases)


def stem(path: Path) -> str:
    """A file's name without the ending that says what it is."""
    end = suffix(path)
    return path.name[: len(path.name) - len(end)] if end else path.name


def _files(folder: Path, endings: Sequence[str]) -> list[Path]:
    """Files of a folder whose names end so, in upper or lower case."""
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [p for p in there if p.name.lower().endswith(tuple(endings)) and not p.name.startswith(".")]
    if not files:
        raise ValueError(f"{folder}: holds no files *{', *'.join(endings)}")
    return files


def _with_labels(cases: Sequence[Case], folder: Path, endings: Sequence[str]) -> tuple[Case, ...]:
    there: dict[str, list[Path]] = {}
    for file in _files(folder, endings):
        there.setdefault(stem(file), []).append(file)
    labelled = []
    for case in cases:
        files = there.get(case.name, [])
        if not files:
            missing = folder / f"{case.name}{endings[0]}"
            raise ValueError(f"{missing}: missing; it should hold the labels of {case.images[0].name}")
        if len(files) > 1:
            raise ValueError(f"{files[1]}: duplicate of {files[0].name}")
        labelled.append(Case(case.name, case.images, files[0]))
    return tuple(labelled)
