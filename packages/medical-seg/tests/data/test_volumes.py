"""Geometry, windows and scaling of volumes."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from medical_seg.data.volumes import measure_scaling, read_volume, sample, sample_label, target_grid

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1)])
def test_order_and_direction_of_axes_change_nothing_and_masks_return_to_them(
    axes: tuple[int, ...], signs: tuple[int, ...], tmp_path: Path
) -> None:
    array = np.random.default_rng(0).integers(0, 99, (4, 5, 6)).astype(np.int16)
    reference = nibabel.Nifti1Image(array, AFFINE)
    orientation = np.array(list(zip(axes, signs, strict=True)), dtype=float)
    turned = reference.as_reoriented(orientation)  # pyright: ignore[reportArgumentType]
    nibabel.save(turned, tmp_path / "t.nii.gz")
    volume = read_volume([tmp_path / "t.nii.gz"])
    assert np.array_equal(volume.data[0], array.transpose(2, 1, 0))
    assert volume.spacing == (3.0, 2.0, 1.0)
    found: Any = nibabel.load(volume.write_mask(volume.data[0].astype(np.uint8), tmp_path / "m"))
    assert np.array_equal(np.asanyarray(found.dataobj), np.asanyarray(turned.dataobj))
    assert turned.affine is not None
    assert np.array_equal(found.affine, turned.affine)


def test_a_window_equals_that_of_the_resampled_volume() -> None:
    data = np.random.default_rng(0).normal(size=(2, 6, 9, 5)).astype(np.float32)
    grid = (9, 7, 5)
    whole = F.interpolate(torch.from_numpy(data)[None], size=grid, mode="trilinear")[0]
    window, inside = sample(data, grid, (-1, 3, 0), (6, 8, 5))
    assert inside == [slice(1, 6), slice(0, 4), slice(0, 5)]
    assert torch.allclose(window[:, 1:, :4], whole[:, :5, 3:], atol=1e-6)
    assert float(window[:, 0].abs().sum() + window[:, :, 4:].abs().sum()) == 0


def test_labels_keep_their_classes_when_resampled() -> None:
    label = np.zeros((4, 4, 4), np.int16)
    label[2:] = 3
    found = sample_label(label, 4, (8, 8, 8), (0, 0, 0), (8, 8, 8))
    assert set(found.unique().tolist()) == {0, 3}
    assert found[:4].sum() == 0
    assert (found[4:] == 3).all()


def test_scaling_leaves_the_surroundings_of_a_stripped_head_out() -> None:
    image = np.zeros((10, 4, 4), np.int16)
    image[:2] = np.arange(32).reshape(2, 4, 4) + 100
    scaling = measure_scaling(image, "zscore")
    assert scaling.mean == pytest.approx(115.5)
    assert measure_scaling(image[:2], "zscore").mean == pytest.approx(115.5)
    assert measure_scaling(image, (0, 1, 2, 3)).std == 3
    assert measure_scaling(image, "none").mean == 0


def test_target_grid_covers_the_extent(tmp_path: Path) -> None:
    volume = read_volume([write(tmp_path / "v.nii.gz", np.ones((4, 5, 6), np.uint8))])
    assert target_grid(volume, (1.5, 2, 1), (8, 8, 8)) == (12, 5, 4)
    assert target_grid(volume, None, (8, 8, 8)) == (8, 8, 8)


def test_files_that_hold_no_volume_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.nii.gz").write_text("no")
    (tmp_path / "a.png").write_text("no")
    for name, message in [
        ("a.nii.gz", "not a readable NIfTI file"),
        ("a.png", "not a picture, or of an unknown format"),
        ("a.doc", "cannot read files of this kind"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_volume([tmp_path / name])
    with pytest.raises(ValueError, match="expected three axes"):
        read_volume([write(tmp_path / "b.nii.gz", np.ones((2, 2, 2, 2), np.uint8))])


def test_a_folder_of_dicom_slices_is_one_case(tmp_path: Path) -> None:
    sitk: Any = pytest.importorskip("SimpleITK")
    voxels = np.random.default_rng(0).integers(0, 500, (3, 6, 5)).astype(np.int16)
    folder = tmp_path / "series"
    folder.mkdir()
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for z, plane in enumerate(voxels):
        picture = sitk.GetImageFromArray(plane)
        picture.SetSpacing((0.7, 0.9))
        tags = {"0008|0060": "MR", "0020|000e": "1.2.3", "0020|000d": "1.2", "0018|0050": "4.0"}
        tags |= {"0020|0032": f"10\\20\\{4.0 * z}", "0020|0037": "1\\0\\0\\0\\1\\0", "0020|0013": str(z)}
        tags |= {"0008|0018": f"1.2.3.{z}"}
        for tag, value in tags.items():
            picture.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{z}.dcm"))
        writer.Execute(picture)
    volume = read_volume([folder])
    # DICOM's axes run to the left and to the back, ours to the right and to the front.
    assert np.array_equal(volume.data[0], voxels[:, ::-1, ::-1])
    assert volume.spacing == pytest.approx((4.0, 0.9, 0.7))
    mask: Any = nibabel.load(volume.write_mask((volume.data[0] > 250).astype(np.uint8), tmp_path / "mask"))
    corner = mask.affine @ np.array([0, 0, 0, 1])
    assert corner[:3] == pytest.approx([-10, -20, 0])
    assert np.array_equal(np.asanyarray(mask.dataobj), (voxels > 250).transpose(2, 1, 0))
