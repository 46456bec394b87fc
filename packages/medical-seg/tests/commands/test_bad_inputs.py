"""Random bad inputs of every verb: a line that says what is wrong, never a traceback, never a hang."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from attn_core.testing.commands import answer, assert_foreseen, bad_inputs
from medical_seg.cli import CLI

NUMBERS = st.one_of(
    st.sampled_from(["nan", "inf", "-1", "0", "1e400", "-0.0", "²", "9" * 400, "", " ", "1,2", "None", "True", "4G"]),
    st.floats().map(repr),
    st.integers().map(str),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
ABOUT = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "x": 1}, "file_ending": ".nii.gz"}
PATHS = ("data", "data/imagesTr", "data/labelsTr", "data/dataset.json", "no", "data/labelsTr/c0.nii.gz")
VERBS = (
    *("plan", "train", "evaluate", "predict", "convert-weights", "demo"),
    *("eval", "export", "info", "benchmark"),
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of five tiny cases."""
    folder = tmp_path_factory.mktemp("good") / "data"
    rng = np.random.default_rng(0)
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for index in range(5):
        image = rng.normal(size=(8, 8, 8)).astype(np.float32)
        for name, array in ((f"imagesTr/c{index}_0000", image), (f"labelsTr/c{index}", (image > 1).astype(np.uint8))):
            nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / f"{name}.nii.gz")
    (folder / "dataset.json").write_text(json.dumps(ABOUT))
    return folder


def spoil(draw: Any, folder: Path) -> None:
    """One thing of a data set becomes odd."""
    files = sorted(folder.glob("*Tr/c0*"))
    what = draw(st.sampled_from(["json", "text", "bytes", "header", "cut", "folder", "nothing"]))
    file = draw(st.sampled_from(files))
    if what == "json":
        key = draw(st.sampled_from([*ABOUT, "regions_class_order", "ignore"]))
        (folder / "dataset.json").write_text(json.dumps(ABOUT | {key: draw(JSON)}))
    elif what == "text":
        (folder / "dataset.json").write_text(draw(st.sampled_from(["", "{", "[]", "null", "[" * 5000, "1e999"])))
    elif what == "bytes":
        content = bytearray(file.read_bytes())
        content[draw(st.integers(0, len(content) - 1))] ^= draw(st.integers(1, 255))
        file.write_bytes(content)
    elif what == "header":
        content = bytearray(gzip.decompress(file.read_bytes()))
        for _ in range(3):
            content[draw(st.integers(0, 351))] = draw(st.integers(0, 255))
        file.write_bytes(gzip.compress(bytes(content), 1))
    elif what == "cut":
        file.write_bytes(file.read_bytes()[: draw(st.integers(0, 300))])
    elif what == "folder":
        file.unlink()
        file.mkdir()


def arguments(draw: Any, verb: str) -> list[str]:
    def some(*names: str) -> list[str]:
        chosen = draw(st.lists(st.sampled_from(names), max_size=2, unique=True))
        return [f"{name}={draw(NUMBERS)}" for name in chosen]

    path = draw(st.sampled_from(PATHS))
    if verb == "plan":
        return ["plan", path, *some("--model", "--geometry-tolerance")]
    if verb == "train":  # with a device that does not exist, so that nothing trains
        odd = some("--model", "--fold", "--window", "--option", "--encoder", "--geometry-tolerance", "--set", "--seed")
        return ["train", "-d", path, "--device", "nosuch", *odd]
    if verb == "evaluate":
        odd = some("--tolerance", "--by-volume", "--overlap", "--geometry-tolerance", "--dataset")
        return ["evaluate", path, draw(st.sampled_from(PATHS)), *odd]
    if verb == "predict":
        odd = some("--step", "--tta", "--max-mem", "--also", "--geometry-tolerance", "--device")
        return ["predict", path, "--run", "run", *odd]
    if verb == "demo":
        return ["demo", "--device", "nosuch", *some("--seed", "--steps"), "--out", path]
    if verb == "eval":
        return ["eval", draw(st.sampled_from(["run", *PATHS])), *some("--split", "--device")]
    if verb == "export":
        target = draw(st.sampled_from([*PATHS, "test_agunet", "agunett", ""]))
        return ["export", target, "--format", draw(st.sampled_from(["onnx2", "", "torch"])), "--out", "x"]
    if verb == "info":
        return ["info", "--", draw(NUMBERS)]
    if verb == "benchmark":
        return ["benchmark", "--device", "nosuch", *some("--batch-size", "--size", "--repeats"), "--", draw(NUMBERS)]
    arch = draw(st.sampled_from(["agunet", "daunet", "msa", "x"]))
    return ["convert-weights", path, "x.safetensors", "--arch", arch]


@pytest.fixture(scope="module")
def trained(good: Path) -> Path:
    """A run of one epoch."""
    run = good.parent / "run"
    small = ("--epochs", "1", "--window", "8,8,8", "--set", "windows_per_case=1")
    made = answer(CLI, "train", "-d", str(good), "-m", "test_agunet", *small, "--out", str(run))
    assert made.code == 0, made.lines
    return run


@pytest.mark.parametrize("verb", VERBS)
@bad_inputs
@given(data=st.data())
def test_bad_inputs_end_in_one_line(
    verb: str, data: st.DataObject, good: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.rmtree("data", ignore_errors=True)
    shutil.copytree(good, "data")
    if not Path("run").exists():
        shutil.copytree(trained, "run")
    spoil(data.draw, Path("data"))
    assert_foreseen(CLI, *arguments(data.draw, verb))
