"""From a folder to masks and numbers, as a user does it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

Run = Callable[..., tuple[int, str, str]]
OBLIQUE = np.array([[0.0, -1.9, 0.3, 10.0], [1.1, 0.2, 0.1, -20.0], [-0.1, 0.3, 3.9, 30.0], [0, 0, 0, 1]])


def write_folder(path: Path, cases: int = 5) -> Path:
    """Balls in noise: two channels, 1.1 × 1.9 × 3.9 mm, an oblique affine, an ignore label in one case."""
    rng = np.random.default_rng(0)
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (path / folder).mkdir(parents=True)
    about = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "ball": 1, "core": 2, "ignore": 3},
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (path / "dataset.json").write_text(json.dumps(about))
    grid = np.stack(np.meshgrid(np.arange(22), np.arange(18), np.arange(9), indexing="ij"))
    for index in range(cases + 2):
        center = np.array([11, 9, 4]) + rng.uniform(-2, 2, 3)
        radius = np.sqrt(
            (((grid - center[:, None, None, None]) * np.array([1.1, 1.9, 3.9])[:, None, None, None]) ** 2).sum(0)
        )
        label = (radius < 9).astype(np.uint8) + (radius < 4)
        image = np.stack([label, label == 1]) * 100 + rng.normal(0, 10, (2, *label.shape))
        if index == 0:
            label[0, 0, :] = 3
        where = "imagesTs" if index >= cases else "imagesTr"
        for channel in range(2):
            file = path / where / f"case_{index:02d}_{channel:04d}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(image[channel].astype(np.int16), OBLIQUE), file)
        if index < cases:
            nibabel.save(nibabel.Nifti1Image(label, OBLIQUE), path / "labelsTr" / f"case_{index:02d}.nii.gz")
    return path


TRAIN = ("train", "volumes", "-d", "data", "-m", "test_agunet", "--window", "8,16,16", "--seed", "0")


# Whole: one run of all verbs; each step needs what the one before it wrote.
def test_a_folder_goes_through_plan_train_predict_evaluate(run: Run, tmp_path: Path) -> None:
    write_folder(tmp_path / "data")
    code, printed, error = run("plan", "data", "-m", "test_agunet")
    assert code == 0, error
    assert "spacing: 3.91 × 1.1 × 1.93 mm" in printed
    assert "ignored label 3" in printed
    code, printed, error = run(*TRAIN, "--epochs", "6", "--set", "windows_per_case=16", "--out", "a")
    assert code == 0, error
    assert "curves.png" in printed
    code, printed, error = run("predict", "data/imagesTs", "--run", "a", "--out", "out", "--max-mem", "8G")
    assert code == 0, error
    for index in (5, 6):
        image: Any = nibabel.load(tmp_path / f"data/imagesTs/case_{index:02d}_0000.nii.gz")
        mask: Any = nibabel.load(tmp_path / f"out/case_{index:02d}.nii.gz")
        assert mask.shape == image.shape
        assert mask.get_data_dtype() == np.uint8
        assert np.abs(mask.affine - image.affine).max() < 1e-6
        assert (mask.header.get_zooms(), mask.header["sform_code"]) == (
            image.header.get_zooms(),
            image.header["sform_code"],
        )
        assert (tmp_path / f"out/case_{index:02d}_overlay.png").stat().st_size > 10_000
    code, printed, error = run(
        "predict", "data/imagesTr", "--run", "a", "--out", "tr", "--no-overlay", "--tta", "mirror"
    )
    assert code == 0, error
    code, printed, error = run("evaluate", "data/labelsTr", "tr", "--out", "scores")
    assert code == 0, error
    summary = json.loads((tmp_path / "scores/summary.json").read_text())
    assert summary["mean"]["1"]["Dice"] > 0.5
    assert {"metric_per_case", "mean", "foreground_mean", "patients"} == set(summary)
    assert (tmp_path / "scores/cases.csv").read_text().count("\n") == 1 + 5 * 3
    assert (tmp_path / "scores/plot.png").exists()
    code, printed, error = run("eval", "a", "--split", "val")
    assert "val dice ball" in printed, error

    # a second call keeps what is finished and does the rest
    (tmp_path / "out/case_05.nii.gz").unlink()
    kept = (tmp_path / "out/case_06.nii.gz").stat().st_mtime_ns
    code, printed, error = run("predict", "data/imagesTs", "--run", "a", "--out", "out", "--continue", "--keep-largest")
    assert code == 0, error
    assert "case_06: kept" in printed
    assert (tmp_path / "out/case_05.nii.gz").exists()
    assert (tmp_path / "out/case_06.nii.gz").stat().st_mtime_ns == kept

    for arguments, words in [
        (("--step", "0"), r"--step must lie in \(0, 1\], got 0"),
        (("--tta", "flip"), "--tta: 'flip' is not one of none, mirror"),
        (("--max-mem", "many"), "--max-mem: expected a size such as 4G or 800M, got 'many'"),
        (("--max-mem", "10M"), r"case_05_0000.nii.gz: needs \d.* GiB, --max-mem allows 0.01"),
        (("--also", "nowhere"), r"nowhere does not exist"),
    ]:
        code, _, error = run("predict", "data/imagesTs", "--run", "a", "--out", "x", *arguments)
        assert code == 1
        assert re.search(words, error), error
        assert len(error.strip().splitlines()) == 1
    (tmp_path / "data/imagesTs/case_06_0001.nii.gz").unlink()
    code, _, error = run("predict", "data/imagesTs", "--run", "a")
    assert "case_06_0000.nii.gz: case 'case_06' lacks channel 1 of 2" in error
    code, _, error = run("evaluate", "data/labelsTr", "out")
    assert "case_00.nii.gz: missing" in error
    code, printed, error = run("export", "a", "--format", "torch-export")
    assert code == 0, error


def test_training_resumes_where_it_stopped(run: Run, tmp_path: Path) -> None:
    write_folder(tmp_path / "data")
    short = (
        *TRAIN,
        "--set",
        "windows_per_case=1",
        "--set",
        "train_cfg.val_interval=1",
        "--set",
        "default_hooks.checkpoint.every_epochs=1",
    )
    assert run(*short, "--epochs", "2", "--out", "whole")[0] == 0
    code, _, error = run(*short, "--epochs", "2", "--out", "part", "--set", "train_cfg.max_epochs=1")
    assert code == 0, error
    code, _, error = run("train", "--resume", "--out", "part", "--set", "train_cfg.max_epochs=2")
    assert code == 0, error

    def weights(name: str) -> dict[str, torch.Tensor]:
        files = sorted((tmp_path / name).rglob("*.safetensors"), key=lambda file: file.stat().st_mtime)
        return load_file(files[-1])

    whole, part = weights("whole"), weights("part")
    assert whole.keys() == part.keys()
    assert all(torch.equal(value, part[name]) for name, value in whole.items())


def test_pictures_train_a_planar_network_and_come_back_as_pictures(run: Run, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        (tmp_path / "photos" / folder).mkdir(parents=True)
    for index in range(5):
        mask = np.zeros((30, 40), np.uint8)
        mask[5 + index : 20 + index, 10:30] = 1
        image = (mask * 120 + rng.integers(0, 60, mask.shape)).astype(np.uint8)
        Image.fromarray(np.stack([image] * 3, -1)).save(tmp_path / f"photos/images/p{index}.png")
        Image.fromarray(mask).save(tmp_path / f"photos/masks/p{index}.png")
    code, printed, error = run("plan", "photos", "-m", "test_msa")
    assert "window: 1×32×48" in printed, error
    code, _, error = run(
        "train",
        "volumes",
        "-d",
        "photos",
        "-m",
        "test_msa",
        "--epochs",
        "1",
        "--set",
        "windows_per_case=1",
        "--out",
        "p",
    )
    assert code == 0, error
    code, _, error = run("predict", "photos/images/p0.png", "--run", "p", "--out", "out")
    assert code == 0, error
    with Image.open(tmp_path / "out/p0.png") as found:
        assert found.size == (40, 30)
        assert found.mode == "L"


@pytest.mark.slow
def test_the_demo_prints_both_rows_and_draws(run: Run, tmp_path: Path) -> None:
    code, printed, error = run("demo", "--steps", "2", "--out", "d")
    assert code == 0, error
    assert "not a benchmark" in printed
    (row,) = [line for line in printed.splitlines() if line.startswith("3-means")]
    assert [float(x) for x in row.split()[-3:]] == pytest.approx([0.746, 0.916, 0.955], abs=0.01)
    assert json.loads((tmp_path / "d/demo.json").read_text())["seed"] == 0
    assert (tmp_path / "d/predictions.png").stat().st_size > 20_000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "-m", "daunet"), "need --data FOLDER"),
        (("train", "volumes"), "no data folder given; use -d FOLDER"),
        (("train", "volumes", "-d", "nowhere"), "nowhere: there is no such folder"),
        (("train", "volumes", "-d", "data", "-f", "x"), "--fold: expected 0 to 4 or all, got 'x'"),
        (("train", "volumes", "-d", "data", "-f", "7"), "there is no fold 7; there are 0 to 4"),
        (("train", "volumes", "-d", "data", "--window", "8,16"), "expected three sizes Z Y X"),
        (
            ("train", "volumes", "-d", "data", "-m", "test_agunet", "--window", "8,16,15"),
            "4 divides it, 15 does not fit",
        ),
        (("train", "volumes", "-d", "data", "-m", "agumet"), "unknown model 'agumet'; did you mean 'agunet'?"),
        (("train", "volumes", "-d", "data", "--option", "x"), "expected NAME=VALUE"),
        (
            ("train", "volumes", "-d", "data", "--option", "filterz=(4,8)"),
            "has no option 'filterz'; did you mean 'filters'?",
        ),
        (("convert-weights", "no.h5", "x", "--arch", "agunet"), "no.h5: there is no such file"),
        (
            ("convert-weights", "data/dataset.json", "x", "--arch", "unet"),
            "--arch must be one of agunet, daunet, msa, ",
        ),
        (("convert-weights", "data/dataset.json", "x", "--arch", "msa"), "is not a checkpoint that loads safely"),
        (("evaluate", "data/labelsTr", "nowhere"), "nowhere: there is no such folder"),
        (("benchmark", "agunet", "--size", "0"), "must be at least 1, got 0 and 5"),
        (("benchmark", "agunett"), "unknown name 'agunett'; did you mean 'agunet'?"),
        (("train", "volumes", "-d", "data", "--whole"), "--whole needs --window Z,Y,X"),
        (("train", "volumes", "-d", "data", "-m", "monai:UNett"), "MONAI has no network 'UNett'; did you mean 'UNet'?"),
        (("evaluate", "data/labelsTr", "data/labelsTr", "--dataset", "x"), "x: there is no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], words: str, run: Run, tmp_path: Path) -> None:
    write_folder(tmp_path / "data")
    code, _, error = run(*arguments)
    assert code != 0
    assert words in error
    assert len(error.strip().splitlines()) == 1, error


def _spoil(path: Path, change: Callable[[np.ndarray], np.ndarray], affine: np.ndarray = OBLIQUE) -> None:
    image: Any = nibabel.load(path)
    array = np.asanyarray(image.dataobj)
    nibabel.save(nibabel.Nifti1Image(change(array), affine), path)


@pytest.mark.parametrize("verb", [("plan", "data"), ("train", "volumes", "-d", "data")], ids=["plan", "train"])
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda d: (d / "labelsTr/case_01.nii.gz").unlink(), r"labelsTr/case_01\.nii\.gz: missing"),
        (
            lambda d: (d / "imagesTr/case_01_0001.nii.gz").unlink(),
            r"case_01_0000\.nii\.gz: case 'case_01' lacks channel 1",
        ),
        (lambda d: [f.unlink() for f in d.glob("imagesTr/case_01*")], r"labelsTr/case_01\.nii\.gz: there is no image"),
        (
            lambda d: _spoil(d / "labelsTr/case_01.nii.gz", lambda a: a[1:]),
            r"labelsTr/case_01\.nii\.gz: grid .* differs",
        ),
        (
            lambda d: _spoil(d / "labelsTr/case_01.nii.gz", lambda a: a, OBLIQUE + 0.1),
            r"labelsTr/case_01\.nii\.gz: the affine",
        ),
        (
            lambda d: _spoil(d / "labelsTr/case_01.nii.gz", lambda a: a * 0.5),
            r"labelsTr/case_01\.nii\.gz: .* not integers",
        ),
        (
            lambda d: _spoil(d / "labelsTr/case_01.nii.gz", lambda a: a * 7),
            r"labelsTr/case_01\.nii\.gz: label \d+ is no class",
        ),
        (
            lambda d: _spoil(d / "imagesTr/case_01_0000.nii.gz", lambda a: a * np.nan),
            r"case_01_0000\.nii\.gz: holds NaN",
        ),
        (
            lambda d: (d / "imagesTr/case_01.nii.gz").write_bytes((d / "imagesTr/case_01_0000.nii.gz").read_bytes()),
            r"case_01_0000\.nii\.gz: duplicate of case_01\.nii\.gz",
        ),
        (
            lambda d: (d / "imagesTr/case_01_0000.nii.gz").write_text("no"),
            r"case_01_0000\.nii\.gz: not a readable NIfTI",
        ),
    ],
    ids=["label", "image", "case", "grid", "affine", "integer", "class", "nan", "duplicate", "broken"],
)
def test_a_broken_case_stops_plan_and_train_in_one_line(
    spoil: Callable[[Path], Any], words: str, verb: tuple[str, ...], run: Run, tmp_path: Path
) -> None:
    spoil(write_folder(tmp_path / "data"))
    code, _, error = run(*verb)
    assert code != 0
    assert re.search(words, error), error
    assert len(error.strip().splitlines()) == 1, error


@pytest.mark.parametrize(("name", "size"), [("position_attention", "2"), ("agunet", "8")])
def test_benchmark_measures_both_sides(name: str, size: str, run: Run, tmp_path: Path) -> None:
    code, _, error = run("benchmark", name, "--size", size, "--repeats", "1", "--json", "rows.json")
    assert code == 0, error
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["quantity"] for row in rows] == [
        f"{k}, {u}" for k in ("training step", "forward") for u in ("ms", "MiB")
    ]
    assert all(row["ours"] >= 0 and row["peer"] >= 0 for row in rows)
