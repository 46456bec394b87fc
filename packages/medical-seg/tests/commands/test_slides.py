"""``medical-seg slides``: from features to figures and heat maps, as a user does it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file

from attn_core.testing.commands import answer, assert_foreseen, bad_inputs
from medical_seg.cli import CLI

Run = Callable[..., tuple[int, str, str]]
TRAIN = ("slides", "train", "-d", "data", "--set", "learning_rate=0.03", "--option", "width=8",
         "--set", "train_cfg.val_interval=8")  # fmt: skip


def write_slides(folder: Path, count: int = 20) -> Path:
    """Slides of 9 to 16 patches with 6 features; every second has one patch that says tumor."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = ["slide_id,label"]
    for k in range(count):
        x = rng.normal(size=(int(rng.integers(9, 17)), 6)).astype(np.float32) * 0.3
        if k % 2:
            x[int(rng.integers(len(x)))] += 3
        with h5py.File(folder / f"s{k:02d}.h5", "w") as file:
            file["features"] = x
            at = np.arange(len(x))
            file["coords"] = np.stack([at % 4, at // 4], 1) * 100
            file["coords"].attrs.update({"patch_size_level0": 100, "level0_width": 400, "level0_height": 400})
        rows.append(f"s{k:02d},{'tumor' if k % 2 else 'normal'}")
    (folder / "labels.csv").write_text("\n".join(rows))
    return folder


# Whole: one run of all verbs; each step needs what the one before it wrote.
def test_features_go_through_train_predict_heatmap_summary(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_slides(tmp_path / "data")
    for number in (1, 2):
        code, printed, error = run(*TRAIN, "--split", str(number), "--epochs", "8", "--out", f"r{number}")
        assert code == 0, error
        monkeypatch.setattr("attn_core.engine.results.draw_curves", lambda *_, **__: None)  # they take seconds
    assert "20 slides of 6 features an instance: normal 10, tumor 10" in printed
    assert "split 2: train 12, val 4, test 4 slides" in printed
    assert (tmp_path / "r1/predictions.png").stat().st_size > 5000
    code, printed, error = run("slides", "eval", "r1")
    assert "test auc macro: 1" in printed, error
    code, printed, error = run("slides", "summary", "r1", "r2", "--out", "all.json")
    assert code == 0, error
    held = json.loads((tmp_path / "all.json").read_text())
    assert held["mean"]["auc_macro"] > 0.9
    assert held["deviation"]["auc_macro"] == pytest.approx(np.std([row["auc_macro"] for row in held["runs"]], ddof=1))
    assert "mean ± standard deviation of 2 runs: macro AUC" in printed
    code, printed, error = run("slides", "predict", "data", "--run", "r1", "--out", "p", "--top", "1")
    assert code == 0, error
    rows = json.loads((tmp_path / "p/predictions.json").read_text())
    hits = 0
    for k, row in enumerate(rows):
        assert row["slide"] == f"s{k:02d}"
        with h5py.File(tmp_path / f"data/s{k:02d}.h5") as file:
            held: Any = file
            strongest = held["coords"][int(np.argmax(np.sum(held["features"][:], 1)))]
        assert row["p(normal)"] + row["p(tumor)"] == pytest.approx(1, abs=1e-5)
        hits += k % 2 and row["most attended"] == [strongest.tolist()]
    assert sum(row["label"] == ("tumor" if k % 2 else "normal") for k, row in enumerate(rows)) >= 18
    assert hits >= 8  # of ten tumors the patch that makes them one

    Image.fromarray(np.full((40, 40, 3), 180, np.uint8)).save(tmp_path / "s01.png")
    code, printed, error = run("slides", "heatmap", "data", "--slide", "s01", "--run", "r1", "--out", "h", "--top", "3",
                               "--thumbnails", ".", "--scale", "linear")  # fmt: skip
    assert code == 0, error
    assert "s01: 3 tiles" in printed
    assert len(json.loads((tmp_path / "h/s01.geojson").read_text())["features"]) == 3
    kept = np.load(tmp_path / "h/s01.npz")
    assert kept["attention"].shape == (5, 1, len(kept["coords"]))
    assert kept["importance"].sum() == pytest.approx(1, abs=1e-5)
    assert (tmp_path / "h/s01.png").stat().st_size > 5000

    for arguments, words in [
        (("heatmap", "data", "--run", "r1", "--scale", "log"), "--scale: 'log' is not one of rank, linear"),
        (("heatmap", "data", "--run", "r1", "--patch", "0"), "--patch must be positive, got 0"),
        (("heatmap", "data", "--run", "r1", "--downsample", "-1"), "--downsample must be positive, got -1"),
        (("heatmap", "data", "--run", "r1", "--slide", "x"), "--slide: there is no slide 'x' among 20"),
        (("heatmap", "data", "--run", "r1", "--thumbnails", "x"), "--thumbnails: x does not exist"),
        (("heatmap", "data", "--run", "r1", "--thumbnails", "p"), "p holds no picture of slide 's00'"),
        (("heatmap", "data", "--run", "r1", "--thumbnails", ".", "--slide", "s01", "--downsample", "5"), "lie outside"),
        (("summary", "r1", "data"), "data"),
        (("predict", "other.npz", "--run", "r1"), "'other' has 5 features an instance, the run was trained on 6"),
        (("heatmap", "plain.npz", "--run", "r1"), "slide 'plain' has no coordinates"),
    ]:
        np.savez(tmp_path / "other.npz", features=np.zeros((3, 5), np.float32))
        np.savez(tmp_path / "plain.npz", features=np.zeros((3, 6), np.float32))
        code, _, error = run("slides", *arguments)
        assert code == 1, arguments
        assert words in error
        assert len(error.strip().splitlines()) == 1
    code, _, error = run("predict", "data", "--run", "r1")
    assert "r1: a run on slides; use medical-seg slides predict" in error


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take most of a short run's time."""
    monkeypatch.setattr("attn_core.engine.results.draw_curves", lambda *_, **__: None)


@pytest.mark.usefixtures("no_curves")
def test_training_resumes_where_it_stopped(run: Run, tmp_path: Path) -> None:
    write_slides(tmp_path / "data")
    short = (*TRAIN, "--set", "most=5", "--option", "mask_drop=0.6", "--epochs", "2")
    assert run(*short, "--out", "whole")[0] == 0
    code, _, error = run(*short, "--out", "part", "--set", "train_cfg.max_epochs=1")
    assert code == 0, error
    code, _, error = run("slides", "train", "--resume", "--out", "part", "--set", "train_cfg.max_epochs=2")
    assert code == 0, error

    def weights(name: str) -> dict[str, torch.Tensor]:
        return load_file(next((tmp_path / name).rglob("step_24*.safetensors")))

    whole, part = weights("whole"), weights("part")
    assert whole.keys() == part.keys()
    assert all(torch.equal(value, part[name]) for name, value in whole.items())


def test_digit_bags_share_no_image_and_nines_make_them_positive() -> None:
    from medical_seg.slides.digit_bags import DigitBags

    sets = {split: DigitBags(split) for split in ("train", "val", "test")}  # type: ignore[arg-type]
    images = {name: {row.numpy().tobytes() for bag in bags.bags for row in bag} for name, bags in sets.items()}
    assert not images["train"] & images["test"]
    assert not images["val"] & images["test"]
    nines = {row.numpy().tobytes() for row in sets["test"].nines}
    for index, bag in enumerate(sets["test"].bags):
        count = sum(row.numpy().tobytes() in nines for row in bag)
        assert count in ((1, 2) if index % 2 else (0,))
        assert 30 <= len(bag) <= 50
    assert not torch.equal(sets["train"][1]["features"][:30], sets["train"][1]["features"][:30])
    assert torch.equal(sets["test"][1]["features"], DigitBags("test")[1]["features"])
    kept = DigitBags("train", fresh=False)
    assert torch.equal(kept[1]["features"], kept[1]["features"])
    with pytest.raises(ValueError, match="split must be 'train', 'val' or 'test', got split='x'"):
        DigitBags("x")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("slides", "train", "--split", "2"), "need --data FOLDER"),
        (("slides", "train", "slides"), "no slides given; use -d FOLDER"),
        (("slides", "train", "-d", "nowhere"), "nowhere does not exist"),
        (("slides", "train", "-d", "data", "--split", "6"), "--split: there are splits 1 to 5, got 6"),
        (("slides", "train", "-d", "data", "-m", "acmil_gaa"), "did you mean 'acmil_ga'?"),
        (("slides", "train", "-d", "data", "-m", "agunet"), "agunet reads images; slides need a network of bags"),
        (("slides", "train", "-d", "data", "--option", "x"), "expected NAME=VALUE"),
        (("slides", "train", "-d", "data", "--merge", "normal"), "no group has the label 'tumor'"),
        (("slides", "train", "-d", "data", "--labels", "no.csv"), "no.csv: not a readable csv"),
        (("train", "volumes", "-d", "data", "-m", "acmil_ga"), "data: "),
        (("slides", "trane"), "did you mean 'train'?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line(arguments: tuple[str, ...], words: str, run: Run, tmp_path: Path) -> None:
    write_slides(tmp_path / "data", 12)
    code, _, error = run(*arguments)
    assert code != 0
    assert words in error
    assert len(error.strip().splitlines()) == 1, error


@pytest.mark.parametrize("target", ["test_acmil", "acmil_mha"])
def test_networks_of_bags_are_described_and_exported(target: str, run: Run) -> None:
    code, printed, error = run("info", target)
    assert "input: bags of any number of instances with" in printed, error
    if target == "test_acmil":
        code, printed, error = run("export", target, "--format", "torch-export")
        assert code == 0, error
        assert "features → logits, branches, attention" in printed


NUMBERS = st.one_of(st.sampled_from(["nan", "inf", "-1", "0", "", "1,2", "None"]), st.integers().map(str))
PATHS = st.sampled_from(["data", "data/s00.h5", "data/labels.csv", "no", "run"])


@pytest.mark.usefixtures("no_curves")
@bad_inputs
@given(data=st.data())
def test_bad_inputs_end_in_one_line(data: st.DataObject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if not Path("data").exists():
        write_slides(tmp_path / "data", 12)
        made = answer(CLI, "slides", "train", "-d", "data", "--epochs", "1", "--out", "run")
        assert made.code == 0, made.lines
    content = bytearray(Path("data/s03.h5").read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    Path("data/s00.h5").write_bytes(content[: data.draw(st.integers(1, len(content)))])
    for verb, names in {
        "train": ["--split", "--splits", "--labels", "--merge", "--option", "--epochs", "--model"],
        "predict": ["--top"],
        "heatmap": ["--patch", "--downsample", "--scale", "--top", "--thumbnails", "--slide"],
        "summary": ["--out"],
    }.items():
        chosen = data.draw(st.lists(st.sampled_from(names), max_size=2, unique=True))
        path = data.draw(PATHS)
        where = {"train": ["-d", path, "--device", "nosuch"], "summary": [path]}.get(verb, [path, "--run", "run"])
        assert_foreseen(CLI, "slides", verb, *where, *(f"{name}={data.draw(NUMBERS)}" for name in chosen))
