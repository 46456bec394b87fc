"""Folders, geometry and windows."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from sklearn.model_selection import KFold
from torch.nn import functional as F

from medical_seg.data.folders import five_folds, group_cases, open_folder, problems, read_folds
from medical_seg.data.icbm152 import Icbm152, load_icbm152
from medical_seg.data.volumes import measure_scaling, read_volume, sample, sample_label, target_grid

AFFINE = np.diag([1.0, 2.0, 3.0, 1.0])


def write(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, affine), path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    about = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}
    (tmp_path / "dataset.json").write_text(json.dumps(about))
    for index in range(2):
        image = np.random.default_rng(index).normal(size=(4, 5, 6)).astype(np.float32)
        write(tmp_path / f"imagesTr/c{index}_0000.nii.gz", image)
        write(tmp_path / f"labelsTr/c{index}.nii.gz", (image > 0).astype(np.uint8))
    return tmp_path


LABEL = np.ones((4, 5, 6), np.uint8)


@pytest.mark.parametrize(
    ("file", "array", "affine", "message"),
    [
        ("labelsTr/c1.nii.gz", np.ones((4, 5, 7), np.uint8), AFFINE, r"c1.nii.gz: grid 7×5×4 differs from 6×5×4"),
        ("labelsTr/c1.nii.gz", LABEL, AFFINE + np.diag([0, 0.1, 0, 0]), "affine differs from that of"),
        ("labelsTr/c1.nii.gz", LABEL * 1.5, AFFINE, "c1.nii.gz: labels are not integers, found 1.5"),
        ("labelsTr/c1.nii.gz", LABEL * 2, AFFINE, "c1.nii.gz: label 2 is no class; there are 0, 1"),
        ("labelsTr/c1.nii.gz", LABEL * 0, AFFINE, "c1.nii.gz: the mask is empty"),
        ("imagesTr/c1_0000.nii.gz", LABEL * np.nan, AFFINE, "c1_0000.nii.gz: holds NaN or infinity"),
    ],
)
def test_a_broken_case_is_named(folder: Path, file: str, array: Any, affine: Any, message: str) -> None:
    assert list(problems(open_folder(folder))) == []
    write(folder / file, array, affine)
    (problem,) = problems(open_folder(folder))
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem)


def test_a_folder_that_cannot_be_used_is_named(folder: Path, tmp_path: Path) -> None:
    (folder / "labelsTr/c1.nii.gz").rename(folder / "c1.nii.gz")
    with pytest.raises(ValueError, match=r"labelsTr/c1.nii.gz: missing"):
        open_folder(folder)
    with pytest.raises(ValueError, match=r"a/c_0000.nii: duplicate of c_0000.nii.gz"):
        group_cases([Path("a/c_0000.nii.gz"), Path("a/c_0000.nii")], 1)
    with pytest.raises(ValueError, match=r"holds neither dataset\.json"):
        open_folder(folder / "imagesTr")
    about = json.loads((folder / "dataset.json").read_text())
    for change, message in [
        ({"labels": {"background": 0, "x": 2}}, "labels must be background: 0 and then 1, 2"),
        ({"labels": {"background": 0, "x": [1, 2]}}, r"regions_class_order must name .* of the 1 regions .* got \[\]"),
        ({"labels": {"background": 0, "x": "1"}}, "labels must be numbers or lists of numbers, got '1'"),
        ({"labels": {"background": 0, "x": 1, "ignore": 5}}, "ignore must be the highest label, 2, got 5"),
        ({"file_ending": ".jpeg2000"}, "file_ending '.jpeg2000' is not one of"),
    ]:
        (folder / "dataset.json").write_text(json.dumps(about | change))
        with pytest.raises(ValueError, match=message):
            open_folder(folder)
    (folder / "dataset.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        open_folder(folder)
    (folder / "dataset.json").write_text("{}")
    with pytest.raises(ValueError, match="'channel_names' is missing"):
        open_folder(folder)


def test_folds_are_scikit_learn_s() -> None:
    names = [f"case_{i:02d}" for i in range(20)]
    expected = KFold(5, shuffle=True, random_state=12345).split(names)
    for ours, (train, val) in zip(five_folds(names[::-1]), expected, strict=True):
        assert ours == {"train": [names[i] for i in train], "val": [names[i] for i in val]}
    with pytest.raises(ValueError, match="4 cases do not fill 5 folds"):
        five_folds(names[:4])


@pytest.mark.parametrize(
    ("folds", "message"),
    [
        ("[1]", "expected a list of"),
        ('[{"train": ["c0"], "val": ["c9"]}]', "fold 0 names the unknown case 'c9'"),
        ('[{"train": ["c0"], "val": ["c0"]}]', "has 'c0' in train and in val"),
    ],
)
def test_a_wrong_split_file_is_named(folder: Path, folds: str, message: str) -> None:
    (folder / "splits_final.json").write_text(folds)
    with pytest.raises(ValueError, match=message):
        read_folds(open_folder(folder))


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
@pytest.mark.parametrize("signs", [(1, 1, 1), (-1, 1, -1)])
def test_order_and_direction_of_axes_change_nothing_and_masks_return_to_them(
    axes: tuple[int, ...], signs: tuple[int, ...], tmp_path: Path
) -> None:
    array = np.random.default_rng(0).integers(0, 99, (4, 5, 6)).astype(np.int16)
    reference = nibabel.Nifti1Image(array, AFFINE)
    orientation = np.array(list(zip(axes, signs, strict=True)), dtype=float)
    turned = reference.as_reoriented(orientation)
    nibabel.save(turned, tmp_path / "t.nii.gz")
    volume = read_volume([tmp_path / "t.nii.gz"])
    assert np.array_equal(volume.data[0], array.transpose(2, 1, 0))
    assert volume.spacing == (3.0, 2.0, 1.0)
    found = nibabel.load(volume.write_mask(volume.data[0].astype(np.uint8), tmp_path / "m"))
    assert np.array_equal(np.asanyarray(found.dataobj), np.asanyarray(turned.dataobj))
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
        ("a.png", "not a readable picture"),
        ("a.doc", "cannot read files of this kind"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_volume([tmp_path / name])
    with pytest.raises(ValueError, match="expected three axes"):
        read_volume([write(tmp_path / "b.nii.gz", np.ones((2, 2, 2, 2), np.uint8))])


def test_the_average_brain_is_symmetric_and_its_blocks_do_not_touch() -> None:
    image, label = load_icbm152()
    assert image.shape == (95, 117, 99)
    assert np.array_equal(image, image[:, :, ::-1])
    train, test = Icbm152("train"), Icbm152("test")
    assert train.label.shape[1] + 4 + test.label.shape[1] == label.shape[1]
    item = train[0]
    assert item["image"].shape == (1, 32, 32, 32)
    assert test[0]["label"].max() == 3
    with pytest.raises(ValueError, match="split must be 'train' or 'test', got split='val'"):
        Icbm152("val")  # pyright: ignore
