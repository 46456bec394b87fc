"""Damaged and odd files: read as they are meant, or refused in one line that names them."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medical_seg.data.volumes import Volume, read_labels, read_volume

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])
VOXELS = np.random.default_rng(0).integers(0, 4, (7, 6, 5)).astype(np.int16)
PIXDIM, DIM, SLOPE, MAGIC, DATATYPE, SROW = 76, 40, 112, 344, 70, 280  # of NIfTI-1's header, in bytes


def stored(array: np.ndarray = VOXELS, affine: np.ndarray = AFFINE) -> bytes:
    return nibabel.Nifti1Image(array, affine).to_bytes()


def changed(place: int, value: Any, kind: str) -> bytes:
    content = bytearray(stored())
    content[place : place + np.dtype(kind).itemsize] = np.array(value, kind).tobytes()
    return bytes(content)


def colors() -> bytes:
    return nibabel.Nifti1Image(np.zeros((3, 3, 3), [("R", "u1"), ("G", "u1"), ("B", "u1")]), AFFINE).to_bytes()


CASES: list[tuple[Callable[[], bytes], str]] = [
    (lambda: b"", r"the file is empty \(0 bytes\)"),
    (lambda: b"no image", "not a readable NIfTI file"),
    (lambda: changed(MAGIC, b"xyz", "S3"), "not a readable NIfTI file"),
    (lambda: changed(DIM + 2, 0, "<i2"), "expected three axes, got shape"),
    (lambda: changed(DIM + 2, -7, "<i2"), "expected three axes, got shape|not a readable NIfTI file"),
    (lambda: changed(DIM + 2, 30_000, "<i2"), "truncated or its header is damaged"),
    (lambda: stored(np.zeros((2, 2, 2, 1, 3), np.uint8)), r"expected three axes, got shape \(2, 2, 2, 1, 3\)"),
    (lambda: stored(np.zeros((2, 2, 2), np.complex64)), "voxels of type complex64 are no numbers"),
    (colors, "voxels of type .* are no numbers"),
    (lambda: changed(DATATYPE, 999, "<i2"), "not a readable NIfTI file"),
    (lambda: changed(SLOPE, np.nan, "<f4"), r"the header's scaling is nan·value \+ 0"),
    (lambda: changed(SLOPE, np.inf, "<f4"), "the header's scaling is inf|not a readable NIfTI file"),
    (lambda: changed(SLOPE + 4, np.nan, "<f4"), "the header's scaling is 1·value . nan|not a readable NIfTI file"),
    (lambda: changed(SROW, np.nan, "<f4"), "the affine holds NaN or infinity"),
    (lambda: changed(SROW, 0, "<f4"), "the affine gives voxels of 0×2×3 mm; spacing must lie between"),
    (lambda: changed(SROW, 1e30, "<f4"), "spacing must lie between 1e-06 and 10000 mm"),
    (lambda: stored()[:-3], "truncated"),
]


@pytest.mark.parametrize("ending", [".nii", ".nii.gz", ".NII.GZ"])
@pytest.mark.parametrize(("make", "message"), CASES)
def test_a_broken_nifti_is_refused_in_one_line(make: Any, message: str, ending: str, tmp_path: Path) -> None:
    content = make()
    file = tmp_path / f"scan{ending}"
    file.write_bytes(gzip.compress(content) if content and ending.lower().endswith("gz") else content)
    with pytest.raises(ValueError, match=rf"scan{ending}: .*({message})") as caught:
        read_volume([file])
    assert "\n" not in str(caught.value)


def test_folders_and_missing_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").mkdir()
    with pytest.raises(ValueError, match=r"a\.nii\.gz: is a folder, not an image"):
        read_volume([tmp_path / "a.nii.gz"])
    with pytest.raises(ValueError, match=r"b\.nii: there is no such file"):
        read_volume([tmp_path / "b.nii"])


def test_a_slope_of_zero_means_no_scaling_and_others_scale(tmp_path: Path) -> None:
    for slope, inter, factor in ((0, 5, (1, 0)), (2, 5, (2, 5)), (1, 0, (1, 0))):
        content = bytearray(stored())
        content[SLOPE : SLOPE + 8] = np.array([slope, inter], "<f4").tobytes()
        (tmp_path / "s.nii.gz").write_bytes(gzip.compress(bytes(content)))
        read = read_volume([tmp_path / "s.nii.gz"])
        assert np.array_equal(read.data[0], VOXELS.transpose(2, 1, 0) * factor[0] + factor[1])


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "f4", "f8", "i8", "u2"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
def test_every_type_and_byte_order_keeps_its_values(kind: Any, order: str, dtype: str, tmp_path: Path) -> None:
    array = VOXELS.astype(order + dtype)
    image = kind(array, AFFINE, kind.header_class(endianness=order))
    image.set_data_dtype(array.dtype)
    for name in ("v.nii", "v.nii.gz"):
        nibabel.save(image, tmp_path / name)
        assert np.array_equal(read_volume([tmp_path / name]).data[0], VOXELS.transpose(2, 1, 0))


def test_every_flipped_bit_of_a_zipped_body_is_noticed(tmp_path: Path) -> None:
    """Without the checksum at the end a third of these would be read as other voxels."""
    whole = gzip.compress(stored(), mtime=0)
    file = tmp_path / "f.nii.gz"
    rng = np.random.default_rng(0)
    for place in rng.integers(10, len(whole), 60):
        content = bytearray(whole)
        content[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(content)
        try:
            read = read_volume([file])
        except ValueError as error:
            said = str(error)
        else:
            said = f"{file}: "
            assert np.array_equal(read.data[0], VOXELS.transpose(2, 1, 0))  # a bit that deflate does not use
        assert said.startswith(f"{file}: ")


def outcome(read: Callable[[], Volume]) -> Volume | str:
    try:
        return read()
    except ValueError as error:
        return str(error)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_bytes_of_a_header_are_refused_or_read(data: st.DataObject, tmp_path: Path) -> None:
    content = bytearray(stored())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 351))] = data.draw(st.integers(0, 255))
    zipped = data.draw(st.booleans())
    file = tmp_path / f"h{'.nii.gz' if zipped else '.nii'}"
    file.write_bytes(gzip.compress(bytes(content), 1) if zipped else content)
    for read in (lambda: read_volume([file]), lambda: read_labels(file)):
        found = outcome(read)
        if isinstance(found, str):
            assert found.startswith(f"{file}: ")
            assert "\n" not in found
        else:
            assert found.data.ndim == 4
            found.write_mask(np.zeros(found.grid, np.uint8), tmp_path / "mask")
