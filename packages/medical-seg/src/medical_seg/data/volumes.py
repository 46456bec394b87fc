"""Images with their geometry: NIfTI, PNG and, through SimpleITK, everything else; windows of them at any spacing.

Arrays are (C, Z, Y, X) with axes along the patient's, whatever order and direction a file stores: flips and
permutations only, nothing is interpolated on reading, and `Volume.write_mask` undoes them. A picture has Z = 1.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

NIFTI = (".nii.gz", ".nii")
PICTURES = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg")
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
        return self.data.shape[1:]  # pyright: ignore

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


def read_volume(paths: Sequence[Path]) -> Volume:
    """Read one case: a file per channel, or one file or DICOM folder with all channels.

    Raises: ValueError, naming the file, if one cannot be read, has not two or three axes, or differs from the first in
    shape or affine.
    """
    parts = [_read(path) for path in paths]
    first = parts[0]
    for part in parts[1:]:
        require_same_grid(first, part)
    if len(parts) == 1:
        return first
    data = np.concatenate([part.data for part in parts])
    return Volume(data, first.spacing, first.affine, first.orientation, first.header, first.path)


def require_same_grid(first: Volume, second: Volume) -> None:
    """Raises: ValueError if shape or affine (beyond 1e-3) of the second file differ from the first's."""
    if first.grid != second.grid:
        raise ValueError(f"{second.path}: grid {_x(second.grid)} differs from {_x(first.grid)} of {first.path.name}")
    difference = float(np.abs(first.affine - second.affine).max())
    if difference > 1e-3:
        raise ValueError(
            f"{second.path}: affine differs from that of {first.path.name} by {difference:.3g}; "
            "the two do not lie on one another"
        )


def _x(grid: Sequence[int]) -> str:
    return "×".join(map(str, grid))


def _read(path: Path) -> Volume:
    end = suffix(path)
    if end in NIFTI:
        return _read_nifti(path)
    if end in PICTURES:
        return _read_picture(path)
    if end in OTHERS or path.is_dir():
        return _read_simpleitk(path)
    raise ValueError(f"{path}: cannot read files of this kind; known are {', '.join(SUFFIXES)} and DICOM folders")


def _read_nifti(path: Path) -> Volume:
    import nibabel

    try:
        image: Any = nibabel.loadsave.load(path)  # pyright: ignore[reportAttributeAccessIssue]
        slope, inter = image.header.get_slope_inter()
        if slope in (None, 1) and inter in (None, 0):
            array = np.asanyarray(image.dataobj)
        else:
            array = image.get_fdata(dtype=np.float32, caching="unchanged")
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError) as error:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(f"{path}: not a readable NIfTI file ({error})") from error
    if array.ndim == 4 and array.shape[3] == 1:
        array = array[..., 0]
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or not array.size:
        raise ValueError(f"{path}: expected three axes, got shape {array.shape}; write one file per channel")
    if array.dtype.kind not in "iuf":
        raise ValueError(f"{path}: voxels of type {array.dtype} are no numbers")
    return _oriented(array, image.affine, image.header, path)


def _oriented(array: np.ndarray, affine: np.ndarray, header: Any, path: Path) -> Volume:
    import nibabel

    orientation = nibabel.orientations.io_orientation(affine)
    if np.isnan(orientation).any() or not np.isfinite(affine).all():
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
        path,  # pyright: ignore[reportArgumentType]
    )  # pyright: ignore


def _read_picture(path: Path) -> Volume:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.mode not in ("L", "RGB", "P", "I;16", "I", "1"):
                image = image.convert("RGB")
            array = np.asarray(image)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path}: not a readable picture") from error
    data = (
        array.astype(np.uint8)[None]
        if array.dtype == bool
        else array[None]
        if array.ndim == 2
        else array.transpose(2, 0, 1)
    )
    return Volume(data[:, None], (1.0, 1.0, 1.0), np.eye(4), None, None, path)


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
    except RuntimeError as error:
        raise ValueError(f"{path}: not a readable image") from error
    array = sitk.GetArrayFromImage(image).transpose()
    if array.ndim != 3:
        raise ValueError(f"{path}: expected three axes, got {array.ndim}")
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * np.array(image.GetSpacing())
    affine[:3, 3] = image.GetOrigin()
    return _oriented(array, np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, None, path)


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
        return tuple(window)  # pyright: ignore
    return tuple(  # pyright: ignore
        max(1, round(n * have / want)) for n, have, want in zip(volume.grid, volume.spacing, spacing, strict=True)
    )


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
