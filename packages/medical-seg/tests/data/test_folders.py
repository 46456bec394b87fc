"""Folders, geometry and windows."""

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import tifffile
from PIL import Image
from sklearn.model_selection import KFold

from medical_seg.data import patches
from medical_seg.data.folders import five_folds, group_cases, open_folder, problems, read_case, read_folds
from medical_seg.data.patches import FolderCases
from medical_seg.data.planning import healthy, make_plan

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
        ("imagesTr/c1_0000.nii.gz", LABEL * np.nan, AFFINE, "c1_0000.nii.gz: holds NaN or infinity"),
    ],
)
def test_a_broken_case_is_named(folder: Path, file: str, array: Any, affine: Any, message: str) -> None:
    assert list(problems(open_folder(folder))) == []
    write(folder / file, array, affine)
    (problem,) = problems(open_folder(folder))
    with pytest.raises(ValueError, match=message):
        raise ValueError(problem)


def test_a_folder_that_cannot_be_used_is_named(folder: Path) -> None:
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
        ({"labels": {"background": 0, "x": [1, 2]}}, r"regions_class_order must name .* of the 1 regions .* got None"),
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


def test_a_healthy_control_is_a_case_and_a_folder_of_nothing_else_is_refused(folder: Path) -> None:
    def plan() -> Any:
        return make_plan(open_folder(folder), lambda _: 4, (4, 8, 8))

    assert plan().empty == 0
    write(folder / "labelsTr/c1.nii.gz", LABEL * 0)
    opened = open_folder(folder)
    assert list(problems(opened)) == []
    assert plan().empty == 1
    assert healthy(1) == ", 1 of them without foreground (healthy controls)"
    cases = FolderCases(str(folder), split="train", fold="all", window=(4, 8, 8), spacing=(3, 2, 1), scaling=["zscore"],
                        windows_per_case=3, foreground=1.0)  # fmt: skip
    assert [int(cases[i]["label"].max()) for i in (0, 1, 2, 3)] == [1, 0, 1, 0]
    write(folder / "labelsTr/c0.nii.gz", LABEL * 0)
    with pytest.raises(ValueError, match="no case has any foreground; there is nothing to learn"):
        plan()


def test_labels_may_be_floats_near_integers(folder: Path) -> None:
    write(folder / "labelsTr/c1.nii.gz", LABEL * np.float32(0.99999994))
    _, label = read_case(open_folder(folder), open_folder(folder).cases[1])
    assert label.dtype == np.int16
    assert (label == 1).all()


def test_image_and_labels_may_lie_apart_as_far_as_allowed(folder: Path) -> None:
    moved = AFFINE.copy()
    moved[0, 3] = 0.3  # of a voxel of 1 mm
    write(folder / "labelsTr/c1.nii.gz", LABEL, moved)
    (problem,) = problems(open_folder(folder))
    assert "lie up to 0.3 mm apart; if they belong together, allow it with --geometry-tolerance 0.32" in problem
    assert list(problems(open_folder(folder, tolerance=0.32))) == []
    assert len(list(problems(open_folder(folder, tolerance=0.1)))) == 1
    with pytest.raises(ValueError, match="--geometry-tolerance: expected mm of 0 or more, got -1"):
        open_folder(folder, tolerance=-1)


def test_endings_count_in_any_case(folder: Path) -> None:
    (folder / "imagesTr/c1_0000.nii.gz").rename(folder / "imagesTr/c1_0000.NII.GZ")
    (folder / "labelsTr/c1.nii.gz").rename(folder / "labelsTr/c1.NII.GZ")
    about = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(about | {"file_ending": ".NII.gz"}))
    opened = open_folder(folder)
    assert [case.name for case in opened.cases] == ["c0", "c1"]
    assert list(problems(opened)) == []


def test_pictures_keep_their_levels_and_masks_their_palette(tmp_path: Path) -> None:
    levels = (np.arange(64).reshape(8, 8) * 1000).astype(np.uint16)
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    tifffile.imwrite(tmp_path / "images/a.TIF", levels, byteorder=">")
    mask = Image.new("P", (8, 8), 2)
    mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    mask.save(tmp_path / "masks/a.PNG")
    opened = open_folder(tmp_path)
    image, label = read_case(opened, opened.cases[0])
    assert np.array_equal(image.data[0, 0], levels)
    assert (label == 2).all()


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
        ('[{"train": ["c0"], "val": []}]', "fold 0 has no case in val"),
        ('[{"train": ["c0"], "val": ["c9"]}]', "fold 0 names the unknown case 'c9'"),
        ('[{"train": ["c0"], "val": ["c0"]}]', "has 'c0' in train and in val"),
    ],
)
def test_a_wrong_split_file_is_named(folder: Path, folds: str, message: str) -> None:
    (folder / "splits_final.json").write_text(folds)
    with pytest.raises(ValueError, match=message):
        read_folds(open_folder(folder))


def test_cases_beyond_the_cache_are_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    monkeypatch.setattr(patches, "read_case", lambda f, case: (read.append(case.name), read_case(f, case))[1])
    for cache, expected in ((2, ["c0", "c1"]), (1, ["c0", "c1", "c0", "c1"])):
        cases = FolderCases(
            str(folder), split="val", fold="all", window=(4, 4, 4), spacing=None, scaling=["none"], cache=cache
        )
        for index in (0, 1, 0, 1):
            _ = cases[index]
        assert read == expected
        read.clear()
