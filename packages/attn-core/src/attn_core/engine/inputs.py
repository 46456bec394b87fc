"""What ``predict`` reads and where its results go: files below the given folders, and tables beside the pictures."""

import contextlib
import csv
import json
import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor


@dataclass(frozen=True)
class InputFile:
    """One file to predict.

    Attributes:
        path: The file.
        stem: Where its results go below the out directory, without an ending: the folders between the inputs' common
            folder and the file, and the file's name. No two inputs of one call share it.
    """

    path: Path
    stem: Path

    def output(self, out: Path, ending: str) -> Path:
        """``<out>/<folders>/<name><ending>``; the folders are made.

        Args:
            out: The out directory of the command.
            ending: What follows the name, e.g. ``"_mask.png"``.
        """
        path = out / self.stem.parent / f"{self.stem.name}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def find_inputs(
    inputs: Sequence[Path], endings: Collection[str], *, what: str = "files", out: Path | None = None
) -> list[InputFile]:
    """The files given, and those with a known ending below the folders given, at any depth, each file once.

    Results mirror the tree below the deepest folder that holds everything given, so ``predict a b`` writes to
    ``<out>/a`` and ``<out>/b``, and equal names in two folders never meet. Names that differ in the ending alone
    (``x.png``, ``x.jpg``) keep it: ``x_png``, ``x_jpg``.

    Args:
        inputs: Files and folders. A file is taken whatever its ending; whoever reads it says what is wrong with it.
        endings: Endings looked for in folders, such as ``(".nii", ".nii.gz")``; upper case counts as lower case.
        what: What the files are, for the message.
        out: The out directory; results of an earlier call in it, below a given folder, are no inputs.

    Raises:
        ValueError: if nothing is given, a path does not exist, or a folder holds no such file.
    """
    if not inputs:
        raise ValueError(f"find_inputs: no {what} given; name files or folders")
    known = tuple(sorted((ending.lower() for ending in endings), key=len, reverse=True))
    given = [Path(os.path.abspath(path)) for path in inputs]
    found: dict[Path, Path] = {}  # absolute path → path as the user wrote it
    for path, absolute in zip(inputs, given, strict=True):
        if absolute.is_dir():
            below = [file for file in _walk(absolute, out) if file.name.lower().endswith(known)]
            if not below:
                raise ValueError(f"find_inputs: {path} holds no {what} ({', '.join(sorted(endings))})")
            for file in below:
                found.setdefault(file, path / file.relative_to(absolute))
        elif absolute.exists():
            found.setdefault(absolute, path)
        else:
            raise ValueError(f"find_inputs: {path} does not exist")
    base = Path(os.path.commonpath([path if path.is_dir() else path.parent for path in given]))
    stems = _distinct([file.relative_to(base) for file in found], known)
    return [InputFile(path, stem) for path, stem in zip(found.values(), stems, strict=True)]


def _walk(folder: Path, out: Path | None) -> Iterator[Path]:
    """Files below a folder in a fixed order, without hidden ones, following links but no folder twice."""
    results = Path(os.path.abspath(out)) if out is not None else None
    seen: set[str] = set()

    def refuse(error: OSError) -> None:
        raise error

    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(place)
        if real in seen or (Path(place) == results and results != folder):
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__MACOSX")))
        yield from (Path(place, name) for name in sorted(files) if not name.startswith("."))


def _distinct(paths: Iterable[Path], endings: tuple[str, ...]) -> list[Path]:
    """Paths without their endings, no two alike on a file system that ignores case."""
    split = []
    for path in paths:
        ending = next((e for e in endings if path.name.lower().endswith(e)), path.suffix)
        name = path.name[: len(path.name) - len(ending)] or path.name
        split.append((path.parent / name, ending.lstrip(".")))
    counts: dict[str, int] = {}
    for stem, _ in split:
        counts[str(stem).lower()] = counts.get(str(stem).lower(), 0) + 1
    taken: set[str] = set()
    result = []
    for stem, ending in split:
        alone = counts[str(stem).lower()] == 1
        wanted = stem if alone or not ending else stem.with_name(f"{stem.name}_{ending}")
        candidate, number = wanted, 1
        while str(candidate).lower() in taken or (not alone and str(candidate).lower() in counts and candidate != stem):
            number += 1
            candidate = wanted.with_name(f"{wanted.name}_{number}")
        taken.add(str(candidate).lower())
        result.append(candidate)
    return result


@dataclass
class PredictionTable:
    """Rows of a ``predict``, written as ``predictions.csv`` and ``predictions.json`` when the block ends.

    They are written after an error or Ctrl-C, too: the rows before it are results. In the csv lists and dicts stand as
    JSON, and every column that any row has is there; in the json numbers that are not finite are null.

        with PredictionTable(out) as table:
            for item in find_inputs(inputs, SUFFIXES):
                table.add(item, label="cat", probability=0.93)

    Attributes:
        out: The out directory; made if it is missing.
    """

    out: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def files(self) -> tuple[Path, Path]:
        """The csv and the json file."""
        return self.out / "predictions.csv", self.out / "predictions.json"

    def add(self, item: InputFile | Path, **columns: Any) -> None:
        """One row: ``file`` as the user wrote it, then the columns (text, numbers, tensors, lists, dicts of these).

        A file may have several rows, e.g. one for each object.
        """
        path = item.path if isinstance(item, InputFile) else item
        self.rows.append({"file": str(path), **{name: _plain(value) for name, value in columns.items()}})

    def __enter__(self) -> Self:
        self.out.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if not self.rows:
            return
        names = list(dict.fromkeys(name for row in self.rows for name in row))
        table, document = self.files
        with _replacing(table) as path, open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(names)
            writer.writerows([_cell(row.get(name)) for name in names] for row in self.rows)
        with _replacing(document) as path:
            text = json.dumps(self.rows, indent=1, ensure_ascii=False, allow_nan=False)
            path.write_text(text + "\n", encoding="utf-8")


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of another when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.writing")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _plain(value: Any) -> Any:
    """Text, finite numbers, booleans, None, and lists and dicts of them."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().tolist()
    elif not isinstance(value, str | bytes) and hasattr(value, "tolist"):  # numpy's arrays and numbers
        value = value.tolist()
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value
