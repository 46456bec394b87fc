"""ActivityNet and THUMOS-14 as windows of features for BMN; features are files that their users have.

ActivityNet: one json, ``{"database": {id: {"duration": 82.7, "subset": "training", "annotations": [{"segment": [1.5,
20.1], "label": "Diving"}]}}}``, and one file of features for each video, rescaled to the steps of the network.
THUMOS-14: ``<Class>_val.txt`` and ``<Class>_test.txt`` with lines ``video start end`` in seconds, and features at an
even rate, in windows that overlap by half. Feature files: ``<id>`` or ``v_<id>`` with ``.npy`` (T, F), or ``.csv`` with
one line of names. Checked in: ``data/test_activities.py``.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from detection.data.events import event_item
from detection.metrics.events import Events

SUBSETS = {"train": "training", "val": "validation", "test": "testing"}
THUMOS_FILES = {"train": "val", "test": "test"}  # its training videos hold one action each and are not used
AMBIGUOUS = "Ambiguous"  # segments that no class is asked for
FEATURES = (".npy", ".csv")


def read_features(file: Path) -> Float[Tensor, "F T"]:
    """Features of a video from ``.npy`` (T, F) or ``.csv`` with a line of names.

    Raises: ValueError naming the file, if it cannot be read, is not a table, is empty or holds numbers that are not
        finite.
    """
    try:
        if file.suffix.lower() == ".csv":
            table = np.loadtxt(file, delimiter=",", skiprows=1, ndmin=2)
        else:
            table = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file}: features cannot be read: {error}") from None
    if table.ndim != 2 or not table.size or table.dtype.kind not in "fiu":
        raise ValueError(f"{file}: features must be (T, F) numbers, got {table.shape} {table.dtype}")
    if not np.isfinite(table).all():
        raise ValueError(f"{file}: features must be finite")
    return torch.from_numpy(np.ascontiguousarray(table.T)).float()


def rescale(features: Float[Tensor, "F T"], steps: int) -> Float[Tensor, "F S"]:
    """Features at ``steps`` places, linearly between those there are; as they are where the number fits."""
    if features.shape[1] == steps:
        return features
    return F.interpolate(features[None], size=steps, mode="linear", align_corners=False)[0]


class ActivityNet(Dataset[dict[str, Any]]):
    """One subset of ActivityNet, a window for each video.

    Args:
        annotations: the json. features: folder of feature files.
        split: ``"train"``, ``"val"`` or ``"test"``. steps: T.
        classes: class names in their order; by default those of all subsets of the json, sorted.
        skip_missing: leave out videos without features, as many have vanished; else they are an error.

    Raises: ValueError for an unknown split, a file that is not such a json, naming the record; for no videos.
    """

    def __init__(
        self,
        annotations: str | Path,
        features: str | Path,
        split: Literal["train", "val", "test"] = "train",
        *,
        steps: int = 100,
        classes: Sequence[str] | None = None,
        skip_missing: bool = False,
    ) -> None:
        if split not in SUBSETS:
            raise ValueError(f"ActivityNet: split must be 'train', 'val' or 'test', got split={split!r}")
        file = Path(annotations)
        try:
            content = json.loads(file.read_text(encoding="utf-8-sig"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"ActivityNet: {file}: not a json file: {error}") from None
        database = content.get("database") if isinstance(content, dict) else None
        if not isinstance(database, dict):
            raise ValueError(f"ActivityNet: {file}: must be an object with 'database'")
        read = {name: _entry(file, name, entry) for name, entry in database.items()}
        names = sorted({label for entry in read.values() for _, _, label in entry[2]})
        self.classes = list(names if classes is None else classes)
        if unknown := [name for name in names if name not in self.classes]:
            raise ValueError(f"ActivityNet: {file}: class {unknown[0]!r} is none of the {len(self.classes)} in classes")
        self.steps, self.videos = steps, []
        for name, (subset, duration, segments) in read.items():
            if subset != SUBSETS[split]:
                continue
            path = (find_features if skip_missing else features_of)(Path(features), name)
            if path is not None:
                self.videos.append((name, path, duration, _events(segments, self.classes)))
        if not self.videos:
            raise ValueError(f"ActivityNet: {file}: no videos of subset {SUBSETS[split]!r} with features in {features}")
        self.metainfo: dict[str, Any] = {"classes": self.classes, "steps": steps}

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, path, duration, truth = self.videos[index]
        features = rescale(read_features(path), self.steps)
        return event_item(features, truth, video=name, window=(0.0, duration), duration=duration)


class Thumos14(Dataset[dict[str, Any]]):
    """One subset of THUMOS-14 in windows of ``steps`` snippets, the last one filled with zeros.

    Args:
        annotations: folder of ``<Class>_val.txt`` and ``<Class>_test.txt``. features: folder of feature files.
        split: ``"train"`` (THUMOS's validation videos) or ``"test"``.
        snippet: seconds from one row of the features to the next. steps: rows of a window, every second of which
            begins in the middle of another.

    In training, windows without an event are left out.
    Raises: ValueError for an unknown split, a folder without such files, a line that is none, naming it.
    """

    def __init__(
        self,
        annotations: str | Path,
        features: str | Path,
        split: Literal["train", "test"] = "train",
        *,
        snippet: float = 8 / 30,
        steps: int = 128,
    ) -> None:
        if split not in THUMOS_FILES:
            raise ValueError(f"Thumos14: split must be 'train' or 'test', got split={split!r}")
        if not 0 < snippet < math.inf or steps < 2:
            raise ValueError(f"Thumos14: snippet must be above 0, steps at least 2, got {snippet} and {steps}")
        ending = f"_{THUMOS_FILES[split]}.txt"
        files = sorted(Path(annotations).glob(f"*{ending}"))
        classes = [file.name.removesuffix(ending) for file in files]
        self.classes = [name for name in classes if name != AMBIGUOUS]
        if not self.classes:
            raise ValueError(f"Thumos14: {annotations}: no files <Class>{ending}")
        found: dict[str, list[tuple[float, float, str]]] = {}
        for file, label in zip(files, classes, strict=True):
            for name, start, end in _lines(file):
                own = found.setdefault(name, [])
                if label != AMBIGUOUS:
                    own.append((start, end, label))
        self.snippet, self.steps = float(snippet), steps
        self.windows: list[tuple[str, Path, int, float, Events]] = []
        for name, segments in sorted(found.items()):
            path = features_of(Path(features), name)
            truth, rows = _events(segments, self.classes), _rows(path)
            for first in range(0, max(rows - steps // 2, 1), steps // 2):
                start, end = first * self.snippet, (first + steps) * self.snippet
                inside = (truth.segments[:, 0] < end) & (truth.segments[:, 1] > start)
                if split == "test" or inside.any():
                    self.windows.append((name, path, first, rows * self.snippet, truth))
        self.metainfo: dict[str, Any] = {"classes": self.classes, "steps": steps}

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name, path, first, duration, truth = self.windows[index]
        features = read_features(path)[:, first : first + self.steps]
        features = F.pad(features, (0, self.steps - features.shape[1]))
        window = (first * self.snippet, (first + self.steps) * self.snippet)
        return event_item(features, truth, video=name, window=window, duration=duration)


def find_features(folder: Path, name: str) -> Path | None:
    """The feature file of a video, if there is one."""
    for stem in (name, f"v_{name}"):
        for ending in FEATURES:
            if (folder / f"{stem}{ending}").is_file():
                return folder / f"{stem}{ending}"
    return None


def features_of(folder: Path, name: str) -> Path:
    """The feature file of a video.

    Raises: ValueError if there is none.
    """
    found = find_features(folder, name)
    if found is None:
        raise ValueError(f"{folder}: no features of video {name!r} ({name}.npy, v_{name}.npy, or .csv)")
    return found


def _entry(file: Path, name: str, entry: Any) -> tuple[str, float, list[tuple[float, float, str]]]:
    """Subset, seconds and segments of a record; of published features that end early, the seconds they cover."""
    where = f"ActivityNet: {file}: video {name!r}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where}: must be an object, got {entry!r}")
    duration: Any = entry.get("duration", entry.get("duration_second"))
    if not _positive(duration):
        raise ValueError(f"{where}: 'duration' must be seconds above 0, got {duration!r}")
    if _positive(entry.get("feature_frame")) and _positive(entry.get("duration_frame")):
        duration *= entry["feature_frame"] / entry["duration_frame"]
    segments = []
    for number, one in enumerate(entry.get("annotations") or []):
        segment: Any = one.get("segment") if isinstance(one, Mapping) else None
        label = one.get("label") if isinstance(one, Mapping) else None
        times = isinstance(segment, list) and len(segment) == 2 and all(_number(value) for value in segment)
        if not times or segment[1] < segment[0] or not isinstance(label, str):
            raise ValueError(
                f"{where}: annotation {number} must have 'segment', start and end in seconds, and 'label', got {one!r}"
            )
        segments.append((float(segment[0]), float(segment[1]), label))
    return str(entry.get("subset", "")), float(duration), segments


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _lines(file: Path) -> Iterator[tuple[str, float, float]]:
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        words = line.split()
        if not words:
            continue
        try:
            name, start, end = words[0], float(words[1]), float(words[2])
        except (IndexError, ValueError):
            raise ValueError(f"{file}: line {number} must be a video, start and end, got {line!r}") from None
        if not 0 <= start <= end < math.inf:
            raise ValueError(f"{file}: line {number} must end after it starts, got {line!r}")
        yield name, start, end


def _events(segments: Sequence[tuple[float, float, str]], classes: Sequence[str]) -> Events:
    times = np.array([each[:2] for each in segments], np.float64).reshape(-1, 2)
    return Events(times, labels=np.array([classes.index(each[2]) for each in segments], np.int64))


def _rows(file: Path) -> int:
    """Rows of a feature file, without reading all of it where that is possible."""
    if file.suffix.lower() == ".npy":
        try:
            return int(np.load(file, mmap_mode="r", allow_pickle=False).shape[0])
        except (OSError, ValueError, EOFError, IndexError) as error:
            raise ValueError(f"{file}: features cannot be read: {error}") from None
    return read_features(file).shape[1]
