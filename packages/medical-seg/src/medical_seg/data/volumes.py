"""Images with their geometry: NIfTI, PNG and, through SimpleITK, everything else; windows of them at any spacing.

Arrays are (C, Z, Y, X) with axes along the patient's, whatever order and direction a file stores: flips and
permutations only, nothing is interpolated on reading, and `Volume.write_mask` undoes them. A picture has Z = 1.
"""

import gzip
import logging
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from attn_core.pictures import read_mask, read_picture, whole_numbers

NIFTI = (".nii.gz", ".nii")
PICTURES = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg")
LARGEST = 1e18  # its square fits into float32
SMALLEST_MM, GREATEST_MM = 1e-6, 1e4
MOST_ZIPPED = 1032  # deflate packs no byte into less
MOST_VOXELS = 2**34
OTHERS = (".nrrd", ".mha", ".mhd")
SUFFIXES = (*NIFTI, *PICTURES, *OTHERS)
Grid = tuple[int, int, int]


@dataclass(frozen=True)
class Volume:
    """One case.

    Attributes:
        data: (C, Z, Y, X) in the stored dtype.
        spacing: of Z, Y, X in mm; pixels of a picture count as 1.
        affine: 4×4 of the file, from its own voxel indices to mm.
        orientation: nibabel's, of the file's axes; None for a picture.
        header: of a NIfTI file, otherwise None.
        path: the first file.
    """

    data: np.ndarray
    spacing: tuple[float, float, float]
    affine: np.ndarray
    orientation: np.ndarray | None
    header: Any
    path: Path

    @property
    def grid(self) -> Grid:
        """Z, Y, X."""
        return self.data.shape[1:]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Voxels along the axes of the file; rows and columns of a picture."""
        if self.orientation is None:
            return self.grid[1:]
        return tuple(self.grid[::-1][axis] for axis in self.orientation[:, 0].astype(int))

    def canonical(self, stored: np.ndarray) -> np.ndarray:
        """A view (Z, Y, X) of an array in the order of the file, for reading and for writing into it."""
        if self.orientation is None:
            return stored[None]
        import nibabel

        return nibabel.orientations.apply_orientation(stored, self.orientation).transpose(2, 1, 0)

    @property
    def voxel_ml(self) -> float:
        """Volume of a voxel in ml."""
        return float(np.prod(self.spacing)) / 1000

    def write_mask(self, mask: np.ndarray, stem: Path) -> Path:
        """Write labels (Z, Y, X) on the grid of the file: same shape, affine and header; uint8, or uint16 if needed.

        The file appears under its name when it is complete.
        """
        mask = mask.astype(np.uint8 if mask.max(initial=0) < 256 else np.uint16, copy=False)
        stem.parent.mkdir(parents=True, exist_ok=True)
        if self.orientation is None:
            from PIL import Image

            path, part = stem.with_name(f"{stem.name}.png"), stem.with_name(f".{stem.name}.part.png")
            Image.fromarray(mask[0]).save(part)
        else:
            import nibabel

            stored = np.empty(self.stored_shape, mask.dtype)
            self.canonical(stored)[:] = mask
            image = nibabel.nifti1.Nifti1Image(stored, self.affine, self.header)  # pyright: ignore[reportAttributeAccessIssue]
            image.set_data_dtype(mask.dtype)
            image.header.set_slope_inter(1, 0)
            image.header["cal_min"] = image.header["cal_max"] = 0
            path, part = stem.with_name(f"{stem.name}.nii.gz"), stem.with_name(f".{stem.name}.part.nii.gz")
            nibabel.loadsave.save(image, part)  # pyright: ignore[reportAttributeAccessIssue]
        os.replace(part, path)
        return path


def suffix(path: Path) -> str:
    """The part of a file's name that says what it is, ``.nii.gz`` included; empty if unknown."""
    return next((end for end in SUFFIXES if path.name.lower().endswith(end)), "")


def read_volume(paths: Sequence[Path], *, tolerance: float | None = None) -> Volume:
    """Read one case: a file per channel, or one file or DICOM folder with all channels.

    Args:
        tolerance: of `require_same_grid`.

    Raises: ValueError, one line that names the file: it cannot be read, is damaged (a flipped bit in a ``.nii.gz``
        included), has not two or three axes, no sensible spacing, or differs from the first in shape or place.
    """
    parts = [_read(path) for path in paths]
    first = parts[0]
    for part in parts[1:]:
        require_same_grid(first, part, tolerance)
    if len(parts) == 1:
        return first
    data = np.concatenate([part.data for part in parts])
    return replace(first, data=data)


def read_labels(path: Path) -> Volume:
    """Read a mask: class numbers as integers, also where a file stores them as floats such as 0.99999994.

    Raises: ValueError, one line that names the file: what `read_volume` refuses, several channels, other numbers than
        integers, colors.
    """
    if suffix(path) in PICTURES:
        return _flat(read_mask(path)[..., None], path)
    volume = _read(path)
    if len(volume.data) != 1:
        raise ValueError(f"{path}: {len(volume.data)} channels, a mask has one")
    return replace(volume, data=whole_numbers(volume.data, str(path)))


def require_finite(volume: Volume) -> None:
    """Raises: ValueError if an image holds NaN, infinity, or numbers that float32 cannot square."""
    if volume.data.dtype.kind != "f":
        return
    for plane in volume.data.reshape(-1, *volume.data.shape[2:]):  # plane by plane: a mask of all would not fit
        if not np.isfinite(plane).all():
            raise ValueError(f"{volume.path}: holds NaN or infinity")
        if (largest := float(np.abs(plane).max(initial=0))) > LARGEST:
            raise ValueError(f"{volume.path}: holds {largest:.3g}, beyond what an image can mean (±{LARGEST:g})")


def require_same_grid(first: Volume, second: Volume, tolerance: float | None = None) -> None:
    """Two files must have one shape and lie on one another.

    Args:
        tolerance: mm that a corner of the one may lie apart from that of the other; None for a tenth of the smallest
            side of a voxel.

    Raises: ValueError, naming the second file.
    """
    if first.grid != second.grid:
        raise ValueError(f"{second.path}: grid {_x(second.grid)} differs from {_x(first.grid)} of {first.path.name}")
    if (first.orientation is None) != (second.orientation is None):
        return  # a picture has no place in the patient
    allowed = 0.1 * min(first.spacing) if tolerance is None else tolerance
    corners = np.array([(*corner, 1.0) for corner in product(*((0, n - 1) for n in first.stored_shape))])
    if first.orientation is None:
        return
    apart = float(np.linalg.norm((corners @ (first.affine - second.affine).T)[:, :3], axis=1).max())
    if not apart <= allowed:
        raise ValueError(
            f"{second.path}: the affine differs from that of {first.path.name}, they lie up to {apart:.3g} mm apart; "
            f"if they belong together, allow it with --geometry-tolerance {apart * 1.05:.2g}"
        )


def _x(grid: Sequence[int]) -> str:
    return "×".join(map(str, grid))


def _read(path: Path) -> Volume:
    end = suffix(path)
    try:
        if not end and path.is_dir():
            return _read_simpleitk(path)
        if not end:
            known = ", ".join(SUFFIXES)
            raise ValueError(f"{path}: cannot read files of this kind; known are {known} and DICOM folders")
        if not path.exists():
            raise ValueError(f"{path}: there is no such file")
        if not path.is_file():
            raise ValueError(f"{path}: is {'a folder' if path.is_dir() else 'no regular file'}, not an image")
        if not path.stat().st_size:
            raise ValueError(f"{path}: the file is empty (0 bytes)")
        if end in PICTURES:
            return _read_picture(path)
        return _read_nifti(path) if end in NIFTI else _read_simpleitk(path)
    except MemoryError:
        raise ValueError(f"{path}: the image does not fit into memory") from None
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ValueError(text if text.startswith(f"{path}: ") else f"{path}: {text}") from None


def _read_nifti(path: Path) -> Volume:
    import nibabel

    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)  # it also logs what it repairs in a header
    try:
        image: Any = nibabel.loadsave.load(path)  # pyright: ignore[reportAttributeAccessIssue]
        if not isinstance(image, nibabel.nifti1.Nifti1Image):  # pyright: ignore[reportAttributeAccessIssue]
            raise ValueError("it is of another format")
        header, affine, shape = image.header, np.array(image.affine, dtype=float), image.shape
        slope, inter = _stored_scaling(path)
    except Exception as error:  # a damaged header: struct.error, KeyError, HeaderDataError, zlib.error, EOFError …
        raise ValueError(f"{path}: not a readable NIfTI file ({_one_line(error)})") from None
    if header.get_data_dtype().kind not in "iuf":
        raise ValueError(f"{path}: voxels of type {header.get_data_dtype()} are no numbers; write one file per channel")
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) not in (2, 3) or min(shape) < 1:
        raise ValueError(f"{path}: expected three axes, got shape {image.shape}; write one file per channel")
    if not np.isfinite([slope, inter]).all():
        raise ValueError(f"{path}: the header's scaling is {slope:g}·value + {inter:g}; set scl_slope and scl_inter")
    _check_affine(affine, path)
    array = _nifti_voxels(path, image).reshape(shape if len(shape) == 3 else (*shape, 1), order="F")
    if (slope, inter) != (1, 0):
        array = array.astype(np.float32) * np.float32(slope) + np.float32(inter)
    return _oriented(array, affine, header, path)


def _stored_scaling(path: Path) -> tuple[float, float]:
    """Slope and intercept as the file has them: a slope of 0 means none; nibabel takes NaN for none, too."""
    import nibabel

    with nibabel.openers.ImageOpener(path) as file:  # pyright: ignore[reportAttributeAccessIssue]
        head = file.read(540)
    nifti2 = head[4:8] in (b"n+2\0", b"ni2\0")
    kind: Any = nibabel.nifti2.Nifti2Header if nifti2 else nibabel.nifti1.Nifti1Header  # pyright: ignore[reportAttributeAccessIssue]
    header = kind(head[:540] if nifti2 else head[:348], check=False)
    slope, inter = float(header["scl_slope"]), float(header["scl_inter"])
    return (1.0, 0.0) if slope == 0 else (slope, inter)


def _nifti_voxels(path: Path, image: Any) -> np.ndarray:
    """Voxels as stored. A ``.nii.gz`` is read to its end, where its checksum stands; nibabel alone would not see it."""
    proxy, size = image.dataobj, path.stat().st_size
    count = int(np.prod([int(n) for n in image.shape], dtype=object))
    needed = proxy.offset + count * proxy.dtype.itemsize
    zipped = path.name.lower().endswith(".gz")
    if needed > (size * MOST_ZIPPED if zipped else size):
        raise ValueError(f"{path}: the file is truncated or its header is damaged ({needed:,} bytes promised)")
    if not zipped:
        return np.asanyarray(proxy.get_unscaled()).reshape(-1, order="F")
    array = np.empty(count, proxy.dtype)
    try:
        with gzip.open(path) as file:
            file.read(proxy.offset)
            view, filled = memoryview(array.data).cast("B"), 0
            while filled < len(view) and (read := file.readinto(view[filled : filled + 2**24])):
                filled += read
            while file.read(2**20):
                pass
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: the file is damaged ({_one_line(error)})") from None
    if filled < len(view):
        raise ValueError(f"{path}: the file is truncated ({proxy.offset + filled:,} of {needed:,} bytes)")
    return array


def _check_affine(affine: np.ndarray, path: Path) -> None:
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise ValueError(f"{path}: the affine holds NaN or infinity")
    with np.errstate(over="ignore"):
        spacing = np.sqrt((affine[:3, :3] ** 2).sum(0))
    if not (spacing >= SMALLEST_MM).all() or not (spacing <= GREATEST_MM).all():
        raise ValueError(
            f"{path}: the affine gives voxels of {_x([f'{mm:.3g}' for mm in spacing])} mm; spacing must lie between "  # pyright: ignore[reportArgumentType]
            f"{SMALLEST_MM:g} and {GREATEST_MM:g} mm"
        )
    if np.linalg.cond(affine[:3, :3] / spacing) > 1e3:
        raise ValueError(f"{path}: the affine does not tell the axes apart")


def _oriented(array: np.ndarray, affine: np.ndarray, header: Any, path: Path) -> Volume:
    import nibabel

    _check_affine(affine, path)
    orientation = nibabel.orientations.io_orientation(affine)
    if np.isnan(orientation).any():
        raise ValueError(f"{path}: the affine does not tell the axes apart")
    canonical = nibabel.orientations.apply_orientation(array, orientation)
    zooms = np.sqrt((affine[:3, :3] ** 2).sum(0))
    spacing = np.empty(3)
    spacing[orientation[:, 0].astype(int)] = zooms
    return Volume(
        canonical.transpose(2, 1, 0)[None],
        tuple(map(float, spacing[::-1])),  # pyright: ignore[reportArgumentType]
        affine,
        orientation,
        header,
        path,
    )


def _read_picture(path: Path) -> Volume:
    levels = read_picture(path).levels
    if levels.shape[2] in (2, 4):
        alpha = levels[..., -1]
        if (alpha != alpha.flat[0]).any():
            raise ValueError(f"{path}: parts are transparent; save the picture without alpha")
        levels = levels[..., :-1]
    return _flat(levels, path)


def _flat(levels: np.ndarray, path: Path) -> Volume:
    """(Y, X, C) as a volume of one plane."""
    return Volume(levels.transpose(2, 0, 1)[:, None], (1.0, 1.0, 1.0), np.eye(4), None, None, path)


def _read_simpleitk(path: Path) -> Volume:
    try:
        import SimpleITK
    except ImportError as error:
        raise ValueError(f"{path}: this kind needs SimpleITK; pip install 'medical-seg[dicom]'") from error
    sitk: Any = SimpleITK
    try:
        if path.is_dir():
            files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(path))
            if not files:
                raise ValueError(f"{path}: the folder holds no DICOM series")
            image = sitk.ReadImage(files)
        else:
            image = sitk.ReadImage(str(path))
        array = sitk.GetArrayFromImage(image).transpose()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{path}: not a readable image ({_one_line(error)})") from None
    if array.ndim != 3 or array.dtype.kind not in "iuf":
        raise ValueError(f"{path}: expected three axes of numbers, got {array.ndim} of type {array.dtype}")
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return _oriented(array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, None, path)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[-160:] or type(error).__name__


@dataclass(frozen=True)
class Scaling:
    """What turns a channel's stored values into the network's: clip, subtract, divide.

    Attributes:
        low, high: limits that values are clipped to.
        mean, std: of what is left.
    """

    low: float
    high: float
    mean: float
    std: float


def measure_scaling(channel: np.ndarray, rule: Literal["zscore", "none"] | Sequence[float]) -> Scaling:
    """The scaling of one channel (Z, Y, X).

    Args:
        rule: ``"zscore"`` measures this image: over its non-zero voxels if more than a quarter are zero, as after skull
            stripping, else over all; ``"none"`` changes nothing; four numbers (low, high, mean, std) hold for all
            images, as for CT.
    """
    if rule == "none":
        return Scaling(-np.inf, np.inf, 0.0, 1.0)
    if not isinstance(rule, str):
        return Scaling(*rule)
    count = nonzero = 0
    sums = np.zeros(2)
    for plane in channel:  # plane by plane: a float64 copy of a large volume would not fit
        values = plane.astype(np.float64).ravel()
        sums += values.sum(), (values**2).sum()
        count, nonzero = count + values.size, nonzero + np.count_nonzero(values)
    used = max(1, nonzero if nonzero < 0.75 * count else count)  # zeros add nothing to either sum
    mean = sums[0] / used
    return Scaling(-np.inf, np.inf, float(mean), float(max(np.sqrt(max(sums[1] / used - mean**2, 0)), 1e-8)))


def target_grid(volume: Volume, spacing: Sequence[float] | None, window: Sequence[int]) -> Grid:
    """Voxels along Z, Y, X that cover the volume at a spacing in mm; None fits the whole volume into one window."""
    if spacing is None:
        return tuple(window)  # pyright: ignore[reportReturnType]
    grid = [max(1, round(n * have / want)) for n, have, want in zip(volume.grid, volume.spacing, spacing, strict=True)]
    if int(np.prod(grid, dtype=object)) > MOST_VOXELS:
        have, want = (" × ".join(f"{mm:.3g}" for mm in sizes) for sizes in (volume.spacing, spacing))
        raise ValueError(f"{volume.path}: voxels of {have} mm at the spacing {want} mm are a grid of {_x(grid)}")
    return tuple(grid)  # pyright: ignore[reportReturnType]


def sample(
    data: np.ndarray, grid: Sequence[int], start: Sequence[int], size: Sequence[int]
) -> tuple[Float[Tensor, "C Z Y X"], list[slice]]:
    """A window of an array as if it were resampled (linearly) to another grid; only the window is computed.

    Args:
        data: (C, Z, Y, X); grid covers the same extent.
        grid: the grid that the array would be resampled to.
        start, size: the window in it; what lies outside is zero.

    Returns: the window in float32, and where in it the data lies.
    """
    regions, axes, inside = [], [], []
    for n, m, begin, length in zip(data.shape[1:], grid, start, size, strict=True):
        low, high = max(0, -begin), min(length, m - begin)
        inside.append(slice(low, max(low, high)))
        positions = (np.arange(begin + low, begin + max(low, high)) + 0.5) * (n / m) - 0.5
        positions = positions.clip(0, n - 1)
        lower = np.floor(positions).astype(int).clip(0, max(0, n - 2))
        first = int(lower[0]) if len(lower) else 0
        regions.append(slice(first, min(n, int(lower[-1]) + 2) if len(lower) else first))
        axes.append((lower - first, positions - lower, n == m))
    # nibabel keeps the file's byte order, which torch does not take.
    part = torch.from_numpy(np.ascontiguousarray(data[(slice(None), *regions)], dtype=np.float32))
    for axis, (lower, share, same) in enumerate(axes, start=1):
        index = torch.from_numpy(lower)
        if same:
            part = (
                part.narrow(axis, 0, len(lower))
                if not share.any()
                else part.index_select(axis, index + torch.from_numpy(share.round().astype(int)))
            )
            continue
        weight = torch.from_numpy(share).float().view([-1 if a == axis else 1 for a in range(4)])
        upper = (index + 1).clamp(max=part.shape[axis] - 1)
        part = torch.lerp(part.index_select(axis, index), part.index_select(axis, upper), weight)
    window = torch.zeros(len(data), *size)
    window[(slice(None), *inside)] = part
    return window, inside


def sample_image(
    volume: Volume, scalings: Sequence[Scaling], grid: Sequence[int], start: Sequence[int], size: Sequence[int]
) -> Float[Tensor, "C Z Y X"]:
    """A window of an image in the network's values; outside the volume it is zero, which is its mean."""
    window, inside = sample(volume.data, grid, start, size)
    view = window[(slice(None), *inside)]
    for channel, scaling in zip(view, scalings, strict=True):
        channel.clamp_(scaling.low, scaling.high).sub_(scaling.mean).div_(scaling.std)
    return window


def sample_label(
    label: np.ndarray, classes: int, grid: Sequence[int], start: Sequence[int], size: Sequence[int]
) -> Tensor:
    """A window of labels (Z, Y, X), class by class as linear coverage, the greatest taken; outside is background."""
    if tuple(grid) == label.shape:
        window, _ = sample(label[None], grid, start, size)
        return window[0].long()
    best = torch.full(tuple(size), 0.0)
    chosen = torch.zeros(tuple(size), dtype=torch.long)
    for k in range(classes):
        coverage, _ = sample((label == k)[None], grid, start, size)
        better = coverage[0] > best
        best = torch.where(better, coverage[0], best)
        chosen[better] = k
    return chosen
