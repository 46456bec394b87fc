"""Random bad inputs of every verb: a line that says what is wrong, never a traceback, never a hang."""

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

Run = Callable[..., tuple[int, str, str]]
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
VERBS = ("plan", "train", "evaluate", "predict", "convert-weights")


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

    path = st.sampled_from(
        ["data", "data/imagesTr", "data/labelsTr", "data/dataset.json", "no", "data/labelsTr/c0.nii.gz"]
    )
    if verb == "plan":
        return ["plan", draw(path), *some("--model", "--geometry-tolerance")]
    if verb == "train":  # with a device that does not exist, so that nothing trains
        odd = some("--model", "--fold", "--window", "--option", "--encoder", "--geometry-tolerance", "--set", "--seed")
        return ["train", "-d", draw(path), "--device", "nosuch", *odd]
    if verb == "evaluate":
        odd = some("--tolerance", "--by-volume", "--overlap", "--geometry-tolerance", "--dataset")
        return ["evaluate", draw(path), draw(path), *odd]
    if verb == "predict":
        odd = some("--step", "--tta", "--max-mem", "--also", "--geometry-tolerance", "--device")
        return ["predict", draw(path), "--run", "run", *odd]
    return [
        "convert-weights",
        draw(path),
        "x.safetensors",
        "--arch",
        draw(st.sampled_from(["agunet", "daunet", "msa", "x"])),
    ]


def check(data: st.DataObject, verbs: tuple[str, ...], good: Path, run: Run, place: Path) -> None:
    shutil.rmtree(place / "data", ignore_errors=True)
    shutil.copytree(good, place / "data")
    spoil(data.draw, place / "data")
    given_ = arguments(data.draw, data.draw(st.sampled_from(verbs)))
    code, printed, error = run(*given_)
    assert code in (0, 1, 2), (given_, error)
    assert "Traceback" not in printed + error, given_
    if code == 1:
        assert len(error.strip().splitlines()) == 1, (given_, error)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_bad_inputs_end_in_one_line(data: st.DataObject, good: Path, run: Run, tmp_path: Path) -> None:
    check(data, VERBS[:3], good, run, tmp_path)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_two_hundred_bad_inputs_end_in_one_line(data: st.DataObject, good: Path, run: Run, tmp_path: Path) -> None:
    if not (tmp_path / "run").exists():
        shutil.copytree(good, tmp_path / "data")
        small = ("--epochs", "1", "--window", "8,8,8", "--set", "windows_per_case=1")
        code, _, error = run("train", "-d", "data", "-m", "test_agunet", *small, "--out", "run")
        assert code == 0, error
    check(data, VERBS, good, run, tmp_path)
