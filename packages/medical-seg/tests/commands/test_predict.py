"""What ``predict`` offers beyond one mask per case, and other networks, through the command line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image

from medical_seg.commands.predict import find_cases

Run = Callable[..., tuple[int, str, str]]
AFFINE = np.array([[0.0, -1.0, 0.0, 5.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0, 0, 0, 1]])


def read(file: Path) -> Any:
    return nibabel.load(file)


def write_shells(path: Path, labels: dict[str, Any], **about: Any) -> Path:
    """Five images of a bright core in a grey shell; label 3 in one corner."""
    for folder in ("imagesTr", "labelsTr"):
        (path / folder).mkdir(parents=True)
    content = {"channel_names": {"0": "T1"}, "labels": labels, "file_ending": ".nii.gz", **about}
    (path / "dataset.json").write_text(json.dumps(content))
    rng = np.random.default_rng(0)
    for index in range(5):
        label = np.zeros((14, 10, 12), np.uint8)
        label[2:11, 2:8, 2:9] = 1
        label[4:8, 3:6, 4:7] = 2
        image = label * 100.0 + rng.normal(0, 10, label.shape)
        label[:2, :2, :2] = 3
        nibabel.save(nibabel.Nifti1Image(image.astype(np.float32), AFFINE), path / f"imagesTr/c{index}_0000.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label, AFFINE), path / f"labelsTr/c{index}.nii.gz")
    return path


TRAIN = ("train", "volumes", "-d", "data", "--window", "8,8,8", "--set", "transforms=[]", "--set", "windows_per_case=1")


def test_regions_are_learned_written_in_order_and_scored(run: Run, tmp_path: Path) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}
    write_shells(tmp_path / "data", labels, regions_class_order=[1, 2])
    code, printed, error = run("plan", "data", "-m", "test_agunet")
    assert code == 0, error
    assert "region whole: labels 1, 2, written as 1" in printed
    for seed in ("0", "1"):
        code, _, error = run(*TRAIN, "-m", "test_agunet", "--epochs", "1", "--seed", seed, "--out", f"r{seed}")
        assert code == 0, error
    code, printed, error = run(
        "predict", "data/imagesTr", "--run", "r0", "--also", "r1", "--out", "out", "--save-probabilities"
    )
    assert code == 0, error
    assert "whole" in printed
    image, mask = (read(tmp_path / name) for name in ("data/imagesTr/c0_0000.nii.gz", "out/c0.nii.gz"))
    chances = np.load(tmp_path / "out/c0_probabilities.npy")
    assert chances.shape == (2, *image.shape)
    assert chances.dtype == np.float16
    assert mask.shape == image.shape
    p = chances.astype(np.float32)
    clear = (np.abs(p - 0.5) > 1e-3).all(0)  # nearer to 1/2, float16 may round a probability to it
    assert clear.mean() > 0.2
    rebuilt = np.where(p[1] > 0.5, 2, np.where(p[0] > 0.5, 1, 0))
    assert np.array_equal(rebuilt[clear], np.asarray(mask.dataobj)[clear])
    code, printed, error = run("evaluate", "data/labelsTr", "out", "--out", "s", "--dataset", "data")
    assert code == 0, error
    summary = json.loads((tmp_path / "s/summary.json").read_text())
    assert set(summary["mean"]) == {"whole", "core"}
    assert summary["mean"]["whole"]["n_ref"] == 9 * 6 * 7
    code, _, error = run(*TRAIN, "-m", "test_agunet", "--epochs", "1", "--set", "spacing=(2,2,2)", "--out", "r2")
    assert code == 0, error
    code, _, error = run("predict", "data/imagesTr", "--run", "r0", "--also", "r2", "--out", "x")
    assert code == 1
    assert "--also: r2 has spacing [2, 2, 2], r0 has [1.0, 1.0, 1.0]" in error


@pytest.mark.parametrize(
    "arguments",
    [
        ("-m", "monai:UNet", "--option", "channels=(4,8)", "--option", "strides=(2,)"),
        ("-m", "test_agunet", "--whole", "--option", "deep_supervision=True"),
    ],
    ids=["monai", "whole"],
)
def test_other_ways_of_training_reach_masks(arguments: tuple[str, ...], run: Run, tmp_path: Path) -> None:
    write_shells(tmp_path / "data", {"background": 0, "shell": 1, "core": 2, "corner": 3})
    code, _, error = run(*TRAIN, *arguments, "--epochs", "1", "--out", "r")
    assert code == 0, error
    code, _, error = run("predict", "data/imagesTr/c1_0000.nii.gz", "--run", "r", "--out", "out", "--no-overlay")
    assert code == 0, error
    assert read(tmp_path / "out/c1.nii.gz").shape == (14, 10, 12)


def test_smp_trains_on_slices_with_a_timm_encoder(run: Run, tmp_path: Path) -> None:
    write_shells(tmp_path / "data", {"background": 0, "shell": 1, "core": 2, "corner": 3})
    options = ("--encoder", "test_resnet", "--option", "encoder_depth=3", "--option", "decoder_channels=(8,8,8)")
    code, _, error = run("train", "volumes", "-d", "data", "-m", "smp:Unet", *options, "--window", "1,32,32",
                         "--set", "windows_per_case=1", "--epochs", "1", "--out", "r")  # fmt: skip
    assert code == 0, error
    code, _, error = run("predict", "data/imagesTr/c1_0000.nii.gz", "--run", "r", "--out", "out", "--no-overlay")
    assert code == 0, error
    assert read(tmp_path / "out/c1.nii.gz").shape == (14, 10, 12)
    code, _, error = run("train", "volumes", "-d", "data", "-m", "smp:Unet", "--encoder", "resnet35", "--epochs", "1")
    assert code == 1
    assert "knows no encoder 'resnet35'; did you mean 'resnet5" in error


def test_data_alone_means_volumes_and_healthy_controls_are_said(run: Run, tmp_path: Path) -> None:
    """Also: equal names in two folders are mirrored, an empty folder is an error, truth and results may be empty."""
    data = write_shells(tmp_path / "data", {"background": 0, "shell": 1, "core": 2, "corner": 3})
    empty = nibabel.Nifti1Image(np.zeros((14, 10, 12), np.uint8), AFFINE)
    for index in range(5):
        if index != 3:
            nibabel.save(empty, data / f"labelsTr/c{index}.nii.gz")
    code, printed, error = run("train", "-d", "data", *TRAIN[4:], "-m", "test_agunet", "--epochs", "1", "--out", "r")
    assert code == 0, error
    assert "data: 5 cases, 4 of them without foreground (healthy controls)" in printed
    assert "val empty_cases 1" in printed
    assert json.loads((tmp_path / "r/run.json").read_text())["recipe"] == "volumes"
    for folder in ("in/a", "in/b/deep"):
        (tmp_path / folder).mkdir(parents=True)
        shutil.copy(data / "imagesTr/c0_0000.nii.gz", tmp_path / folder)
    code, printed, error = run("predict", "in", "--run", "r", "--out", "out")
    assert code == 0, error
    for case in ("a/c0", "b/deep/c0"):
        assert f"{case}: shell" in printed
        with Image.open(tmp_path / f"out/{case}_overlay.png") as picture:
            assert max(picture.size) <= 1100
    rows = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [row["case"] for row in rows] == ["a/c0", "b/deep/c0"]
    assert set(rows[0]) >= {"file", "mask", "shell [ml]"}
    (tmp_path / "nothing").mkdir()
    code, _, error = run("predict", "nothing", "--run", "r")
    assert code == 1
    assert "nothing holds no images" in error
    code, printed, error = run("evaluate", "data/labelsTr", "data/labelsTr", "--out", "s")
    assert code == 0, error
    assert "4 of 5 cases have no foreground; 4 of these were left empty" in printed


def test_pictures_of_a_camera_are_cases_of_their_own(tmp_path: Path) -> None:
    for name in ("IMG_0000.JPG", "IMG_0001.JPG"):
        (tmp_path / name).touch()
    assert [case.name for case in find_cases([tmp_path], None, tmp_path / "out")] == ["IMG_0000", "IMG_0001"]
    with pytest.raises(ValueError, match=r"case 'IMG' has more than 1 channels"):
        find_cases([tmp_path], 1, tmp_path / "out")
