"""Folders of cases: nnU-Net's raw layout, and pictures beside their masks; found, checked, split.

nnU-Net v2 (https://github.com/MIC-DKFZ/nnUNet, documentation/dataset_format.md)::

    Dataset001_Name/dataset.json  imagesTr/ID_0000.nii.gz, ID_0001.nii.gz …  labelsTr/ID.nii.gz  imagesTs/

Pictures::

    name/images/ID.png  masks/ID.png        grey or RGB; pixels of masks are class numbers
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medical_seg.data.volumes import PICTURES, SUFFIXES, Volume, read_volume, require_same_grid, suffix

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
    """

    path: Path
    channels: tuple[str, ...]
    classes: tuple[str, ...]
    regions: tuple[tuple[int, ...], ...] | None
    order: tuple[int, ...]
    ignore: int | None
    cases: tuple[Case, ...]

    @property
    def labels(self) -> int:
        """How many labels there are with the background and without the ignored one."""
        return len(self.classes) if self.regions is None else 1 + len({k for region in self.regions for k in region})


def open_folder(path: Path) -> Folder:
    """Find the cases of a folder; files are listed, not read.

    Raises: ValueError, naming the file or folder, for a layout that is neither of the two, a broken dataset.json, a
    case without all its channels or without labels, two files for one case.
    """
    if (path / "dataset.json").is_file():
        return _open_nnunet(path)
    if (path / "images").is_dir() and (path / "masks").is_dir():
        return _open_pictures(path)
    if not path.is_dir():
        raise ValueError(f"{path}: there is no such folder")
    raise ValueError(f"{path}: holds neither dataset.json (nnU-Net's layout) nor images/ and masks/ (pictures)")


def group_cases(files: Sequence[Path], channels: int) -> list[Case]:
    """Images without labels, by case: ``ID_0000.nii.gz`` … , or any names if there is one channel.

    Raises: ValueError for a case with missing channels or two files of one name.
    """
    cases: dict[str, dict[int, Path]] = {}
    for file in files:
        stem = file.name.removesuffix(suffix(file)) if suffix(file) else file.name
        match = re.fullmatch(r"(.+)_(\d{4})", stem)
        name, channel = (match[1], int(match[2])) if match else (stem, 0)
        if channel in cases.setdefault(name, {}):
            raise ValueError(
                f"{file}: duplicate of {cases[name][channel].name}, both are channel {channel} of {name!r}"
            )
        cases[name][channel] = file
    for name, found in cases.items():
        # Pictures and 4-channel formats hold all channels in one file.
        if len(found) == 1 and suffix(next(iter(found.values()))) in PICTURES:
            continue
        for channel in range(channels):
            if channel not in found:
                there = next(iter(found.values()))
                raise ValueError(f"{there}: case {name!r} lacks channel {channel} of {channels} ({name}_{channel:04d})")
    return [Case(name, tuple(found[c] for c in sorted(found)), None) for name, found in sorted(cases.items())]


def five_folds(names: Sequence[str]) -> list[dict[str, list[str]]]:
    """nnU-Net's default folds: sorted names, scikit-learn's ``KFold(5, shuffle=True, random_state=12345)``.

    Raises: ValueError for fewer than five names.
    """
    if len(names) < FOLDS:
        raise ValueError(f"five_folds: {len(names)} cases do not fill {FOLDS} folds; write splits_final.json yourself")
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
        folds = json.loads(file.read_text())
        pairs = [(list(fold["train"]), list(fold["val"])) for fold in folds]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: expected a list of {{'train': [...], 'val': [...]}}") from error
    for number, (train, val) in enumerate(pairs):
        for name in (*train, *val):
            if name not in names:
                raise ValueError(f"{file}: fold {number} names the unknown case {name!r}")
        if both := set(train) & set(val):
            raise ValueError(f"{file}: fold {number} has {min(both)!r} in train and in val")
    return [{"train": train, "val": val} for train, val in pairs]


def read_case(folder: Folder, case: Case) -> tuple[Volume, np.ndarray]:
    """Image and labels (Z, Y, X) of a case, checked.

    Raises: ValueError, naming the file: other grid or affine, NaN or infinity, labels that are no integers or no
    classes, a mask without foreground.
    """
    image = read_volume(case.images)
    if len(image.data) != len(folder.channels):
        raise ValueError(f"{image.path}: {len(image.data)} channels, the data set has {len(folder.channels)}")
    for plane in image.data.reshape(-1, *image.data.shape[2:]):
        if plane.dtype.kind == "f" and not np.isfinite(plane).all():
            raise ValueError(f"{image.path}: holds NaN or infinity")
    if case.label is None:
        raise ValueError(f"{image.path}: case {case.name!r} has no label")
    mask = read_volume([case.label])
    require_same_grid(image, mask)
    values = mask.data[0]
    if len(mask.data) != 1:
        raise ValueError(f"{case.label}: {len(mask.data)} channels, a mask has one")
    found = np.unique(values)
    if not np.isfinite(found).all() or (found != found.round()).any():
        raise ValueError(f"{case.label}: labels are not integers, found {found[found != found.round()][0]:g}")
    known = {*range(folder.labels)} | ({folder.ignore} if folder.ignore is not None else set())
    if unknown := [int(value) for value in found if int(value) not in known]:
        raise ValueError(
            f"{case.label}: label {unknown[0]} is no class; there are {', '.join(map(str, sorted(known)))}"
        )
    if not (found > 0).any():
        raise ValueError(f"{case.label}: the mask is empty")
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
    try:
        about: dict[str, Any] = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    for key in ("channel_names", "labels", "file_ending"):
        if key not in about:
            raise ValueError(f"{file}: {key!r} is missing")
    labels = dict(about["labels"])
    ignore = labels.pop("ignore", None)
    given = {name: value if isinstance(value, list) else [value] for name, value in labels.items()}
    for value in (number for numbers in given.values() for number in numbers):
        if not isinstance(value, int):
            raise ValueError(f"{file}: labels must be numbers or lists of numbers, got {value!r}")
    numbers = sorted({number for value in given.values() for number in value})
    if numbers != list(range(len(numbers))) or given.get("background") != [0] or len(numbers) < 2:
        raise ValueError(f"{file}: labels must be background: 0 and then 1, 2, … without gaps, got {numbers}")
    if ignore is not None and ignore != len(numbers):
        raise ValueError(f"{file}: ignore must be the highest label, {len(numbers)}, got {ignore}")
    regions, order = None, ()
    if any(isinstance(value, list) for value in labels.values()):
        given.pop("background")
        regions = tuple(tuple(value) for value in given.values())
        order = tuple(about.get("regions_class_order", ()))
        if len(order) != len(regions) or not set(order) <= set(numbers[1:]):
            raise ValueError(
                f"{file}: regions_class_order must name the label that each of the {len(regions)} regions is "
                f"written as, got {list(order)}"
            )
        classes = tuple(given)
    else:
        classes = tuple(sorted(labels, key=labels.__getitem__))
    channels = tuple(about["channel_names"][key] for key in sorted(about["channel_names"], key=int))
    ending = about["file_ending"]
    if ending not in SUFFIXES:
        raise ValueError(f"{file}: file_ending {ending!r} is not one of {', '.join(SUFFIXES)}")
    found = group_cases(_files(path / "imagesTr", ending), len(channels))
    cases = _with_labels(found, path / "labelsTr", (ending,))
    names = {case.name for case in cases}
    for label in _files(path / "labelsTr", ending):
        if label.name.removesuffix(ending) not in names:
            raise ValueError(f"{label}: there is no image of this case in imagesTr")
    return Folder(path, channels, classes, regions, order, ignore, cases)


def _open_pictures(path: Path) -> Folder:
    images = [file for end in PICTURES for file in _files(path / "images", end, required=False)]
    if not images:
        raise ValueError(f"{path / 'images'}: holds no pictures ({', '.join(PICTURES)})")
    cases = _with_labels(group_cases(sorted(images), 1), path / "masks", PICTURES)
    first = read_volume(cases[0].images)
    highest = max(int(read_volume([case.label]).data.max()) for case in cases if case.label)
    if highest > 31:
        raise ValueError(
            f"{path / 'masks'}: the highest grey level is {highest}; masks hold class numbers 0, 1, 2, …, "
            "divide grey levels such as 0 and 255 first"
        )
    channels = ("grey",) if len(first.data) == 1 else ("red", "green", "blue")
    classes = ("background", *(f"class_{k}" for k in range(1, max(highest, 1) + 1)))
    return Folder(path, channels, classes, None, (), None, cases)


def _files(folder: Path, ending: str, *, required: bool = True) -> list[Path]:
    files = sorted(p for p in folder.glob(f"*{ending}") if not p.name.startswith(".")) if folder.is_dir() else []
    if required and not files:
        raise ValueError(f"{folder}: holds no files *{ending}")
    return files


def _with_labels(cases: Sequence[Case], folder: Path, endings: Sequence[str]) -> tuple[Case, ...]:
    labelled = []
    for case in cases:
        files = [folder / f"{case.name}{ending}" for ending in endings]
        there = [file for file in files if file.is_file()]
        if not there:
            raise ValueError(f"{files[0]}: missing; it should hold the labels of {case.images[0].name}")
        if len(there) > 1:
            raise ValueError(f"{there[1]}: duplicate of {there[0].name}")
        labelled.append(Case(case.name, case.images, there[0]))
    return tuple(labelled)
