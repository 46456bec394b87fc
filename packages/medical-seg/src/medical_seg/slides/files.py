"""Files of instance features: what a header says, and features read when they are asked for.

========================  =====================================================================================
ACMIL ``.h5``             a group for each slide: ``feat`` (N, C), ``coords`` (N, 2), attribute ``label``
CLAM, TRIDENT ``.h5``     one slide: ``features`` (N, C) or (1, N, C), ``coords`` (N, 2), whose attributes may
                          name the side of a patch
CLAM ``.pt``              one slide: a tensor (N, C)
``.npz``                  one slide: ``features`` or ``feat``, and where there are ``coords`` and ``label``
========================  =====================================================================================

Opening reads headers alone; features come in pieces, half precision becomes float32. Coordinates are pixels of the
largest level of the slide, the upper left corner of each patch.
"""

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

ENDINGS = (".h5", ".hdf5", ".pt", ".pth", ".npz")
PIECE = 8192  # instances that are read at once
NAMES = ("features", "feat")
SIDES = ("patch_size_level0", "patch_size_lv0", "patch_size")  # of TRIDENT, of others, of CLAM's level 0


@dataclass(frozen=True)
class Slide:
    """A bag of instances in a file.

    Attributes:
        name: of the slide.
        path: the file.
        group: where in a file of many slides; empty if the file is the slide's own.
        instances: N.
        channels: C.
        label: what the file says, as text; None if it says nothing.
        placed: the file that holds coordinates; None if none does.
        side: of a patch, in pixels of the largest level; None if the file does not say.
        extent: width and height of the slide in the same pixels; None if the file does not say.
    """

    name: str
    path: Path
    group: str
    instances: int
    channels: int
    label: str | None
    placed: Path | None
    side: float | None
    extent: tuple[float, float] | None = None

    def features(self) -> Float[Tensor, "N C"]:
        """All features, float32.

        Raises: ValueError if they cannot be read or are not finite; the message names the file.
        """
        return torch.cat(list(self.pieces()))

    def pieces(self, size: int = PIECE) -> Iterator[Float[Tensor, "n C"]]:
        """Features of at most ``size`` instances at a time, float32.

        Raises: ValueError if they cannot be read or are not finite; the message names the file.
        """
        with _stored(self.path, self.group) as (held, _), _named(self.path):
            features = _field(held, NAMES)
            for begin in range(0, self.instances, size):
                part = features[0, begin : begin + size] if features.ndim == 3 else features[begin : begin + size]
                piece = torch.as_tensor(np.asarray(part) if not isinstance(part, Tensor) else part).float()
                if not bool(torch.isfinite(piece).all()):
                    raise ValueError(f"{self.path}: slide {self.name!r} holds features that are NaN or infinite")
                yield piece

    def coordinates(self) -> np.ndarray | None:
        """Upper left corners (N, 2), X and Y; None where there are none."""
        if self.placed is None:
            return None
        group = self.group if self.placed == self.path else ""
        with _stored(self.placed, group) as (held, _), _named(self.placed):
            return np.asarray(_field(held, ("coords",))).reshape(-1, 2).astype(np.int64)


def read_headers(path: Path, name: str) -> list[Slide]:
    """The slides of a file; none if it holds coordinates alone.

    Args:
        name: of the slide, if the file is one slide's own.

    Raises: ValueError if the file cannot be read, or holds no features, or other numbers of these and of coordinates;
        the message names the file.
    """
    if path.suffix.lower() not in ENDINGS:
        raise ValueError(f"{path}: features are read from {', '.join(ENDINGS)} files")
    with _stored(path, "") as (held, kinds), _named(path):
        if _field(held, NAMES) is not None:
            return [_header(path, "", name, held, kinds)]
        if groups := kinds.get("slides"):
            return [_header(path, group, group, *_inside(held[group])) for group in sorted(groups)]
        if _field(held, ("coords",)) is not None:
            return []
        found = ", ".join(sorted(map(str, held))[:6]) or "nothing"
        raise ValueError(f"{path}: holds no features (expected one of {', '.join(NAMES)}, or a group for each slide; "
                         f"found {found})")  # fmt: skip


def with_places(slide: Slide, path: Path) -> Slide:
    """A slide whose coordinates stand in a file of their own.

    Raises: ValueError if they are not as many as its instances.
    """
    with _stored(path, "") as (held, kinds), _named(path):
        count = len(_field(held, ("coords",)))
        if count != slide.instances:
            raise ValueError(f"{path}: {count} coordinates, {slide.path} has {slide.instances} instances")
        return replace(slide, placed=path, side=_side(kinds), extent=_extent(kinds))


def _header(path: Path, group: str, name: str, held: Any, kinds: dict[str, Any]) -> Slide:
    where = f"{path}: slide {name!r}" if group else f"{path}:"
    features, places = _field(held, NAMES), _field(held, ("coords",))
    if features is None:
        raise ValueError(f"{where} has no features (expected one of {', '.join(NAMES)})")
    shape = tuple(features.shape)
    if len(shape) == 3 and shape[0] == 1:
        shape = shape[1:]
    kind = str(features.dtype).removeprefix("torch.")
    if len(shape) != 2 or "float" not in kind:
        raise ValueError(f"{where} features must be floats (N, C), got {kind} {tuple(features.shape)}")
    if 0 in shape:
        raise ValueError(f"{where} has no instance: its features are {tuple(features.shape)}")
    if places is not None and int(np.prod(places.shape)) != 2 * shape[0]:
        raise ValueError(f"{where} has {shape[0]} instances and coordinates {tuple(places.shape)}")
    label = kinds.get("label", _field(held, ("label",)))
    if label is not None:
        label = _text(label)
    placed = path if places is not None else None
    return Slide(name, path, group, shape[0], shape[1], label, placed, _side(kinds), _extent(kinds))


def _text(label: Any) -> str:
    value = np.asarray(label)
    if value.size != 1:
        raise ValueError(f"a label must be one number or word, got {value.shape}")
    value = value.reshape(()).item()
    if isinstance(value, bytes):
        return value.decode()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _side(kinds: dict[str, Any]) -> float | None:
    """Of a patch in pixels of the largest level; CLAM's patches may be of another level, which it then names."""
    for name in SIDES:
        if name in kinds:
            level = float(np.max(kinds.get("downsample", 1))) if name == "patch_size" else 1.0
            return float(np.max(kinds[name])) * level
    return None


def _extent(kinds: dict[str, Any]) -> tuple[float, float] | None:
    """Of the slide: TRIDENT's words, or CLAM's size of the level that its patches are of."""
    if "level0_width" in kinds and "level0_height" in kinds:
        return float(kinds["level0_width"]), float(kinds["level0_height"])
    if "level_dim" in kinds:
        width, height = (float(x) for x in np.asarray(kinds["level_dim"]).reshape(-1)[:2])
        level = float(np.max(kinds.get("downsample", 1)))
        return width * level, height * level
    return None


@contextmanager
def _stored(path: Path, group: str) -> Iterator[tuple[Any, dict[str, Any]]]:
    """What a file holds by name, without reading it, and its attributes.

    Raises: ValueError if the file cannot be opened.
    """
    ending = path.suffix.lower()
    if ending in (".h5", ".hdf5"):
        with _hdf5(path) as file:
            yield _inside(file[group] if group else file)
    elif ending == ".npz":
        yield _Archive(path), {}
    else:
        held = _torch(path)
        yield (held if isinstance(held, dict) else {"features": held}), {}


def _inside(place: Any) -> tuple[Any, dict[str, Any]]:
    """A group of an HDF5 file, and the attributes of it and of its coordinates."""
    kinds = dict(place.attrs)
    if "coords" in place:
        kinds |= dict(place["coords"].attrs)
    groups = [name for name, child in place.items() if hasattr(child, "keys")]
    return place, {**kinds, "slides": groups if "coords" not in place else []}


@contextmanager
def _hdf5(path: Path) -> Iterator[Any]:
    try:
        import h5py
    except ImportError:
        raise ValueError(f"{path}: HDF5 files need h5py, which is not installed; "
                         "pip install 'medical-seg[weights]'") from None  # fmt: skip
    try:
        file = h5py.File(path, "r", locking=False)
    except OSError as error:
        raise ValueError(f"{path}: not a readable HDF5 file ({_first_line(error)})") from error
    with file:
        yield file


def _torch(path: Path) -> Any:
    """A tensor, or a dict of such, whose numbers stay in the file until they are used."""
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:  # of torch before 1.6: no archive, so it is read whole
            if "mmap" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of pickle, of the archive, of torch: whatever a damaged file leads to
        raise ValueError(f"{path}: not a tensor file that loads safely ({_first_line(error)})") from error


class _Archive(dict[str, Any]):
    """Arrays of an ``.npz`` by name: their headers, and numbers when they are asked for."""

    def __init__(self, path: Path) -> None:
        try:
            with zipfile.ZipFile(path) as archive:
                for name in archive.namelist():
                    with archive.open(name) as file:
                        first = np.lib.format.read_magic(file) == (1, 0)
                        read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
                        shape, _, dtype = read(file)
                    self[name.removesuffix(".npy")] = _Deferred(path, name.removesuffix(".npy"), shape, dtype)
        except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path}: not a readable .npz file ({_first_line(error)})") from error


class _Deferred:
    """An array of an archive, read at its first use and then kept."""

    def __init__(self, path: Path, name: str, shape: tuple[int, ...], dtype: Any) -> None:
        self.path, self.name, self.shape, self.dtype, self.ndim = path, name, shape, dtype, len(shape)
        self.held: np.ndarray | None = None

    def __len__(self) -> int:
        return self.shape[0]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.held is None:
            with np.load(self.path, allow_pickle=False) as archive:
                self.held = archive[self.name]
        return np.array(self.held, dtype=dtype, copy=copy)

    def __getitem__(self, place: Any) -> np.ndarray:
        return np.asarray(self)[place]


def _field(held: Any, names: tuple[str, ...]) -> Any:
    """The first of the names that is there and holds numbers."""
    for name in names:
        if name in held and hasattr(held[name], "shape"):
            return held[name]
    return None


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of libraries while they read: one line with the file's name."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(str(path)):
            raise
        raise ValueError(f"{path}: cannot be read ({_first_line(error)})") from error
    except (OSError, RuntimeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error, TypeError) as error:
        raise ValueError(f"{path}: cannot be read ({_first_line(error)})") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
