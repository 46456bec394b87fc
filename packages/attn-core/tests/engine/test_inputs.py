"""Inputs of predict: found at any depth, each once, and no result over another."""

import csv
import json
import os
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attn_core.engine.inputs import InputFile, PredictionTable, find_inputs

ENDINGS = (".png", ".jpg", ".nii", ".nii.gz")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """``tree("a/x.png", ...)`` makes the files; the folder is the current one."""
    monkeypatch.chdir(tmp_path)

    def make(*names: str) -> None:
        for name in names:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_bytes(b"x")

    return make


def _found(*inputs: str, **options) -> dict[str, str]:
    return {str(item.path): str(item.stem) for item in find_inputs([Path(p) for p in inputs], ENDINGS, **options)}


def test_folders_are_searched_at_any_depth_whatever_the_case_of_the_ending(tree):
    tree("a/1.png", "a/b/2.PNG", "a/b/c/3.Nii.GZ", "a/notes.txt", "a/.hidden.png", "a/.git/4.png", "a/__MACOSX/5.png")
    assert _found("a") == {"a/1.png": "1", "a/b/2.PNG": "b/2", "a/b/c/3.Nii.GZ": "b/c/3"}


def test_equal_names_in_two_folders_give_two_results(tree):
    tree("first/x.png", "second/x.png", "second/deep/x.png")
    assert _found("first", "second") == {
        "first/x.png": "first/x",
        "second/deep/x.png": "second/deep/x",
        "second/x.png": "second/x",
    }
    assert _found("first/x.png", "second/x.png") == {"first/x.png": "first/x", "second/x.png": "second/x"}


def test_names_that_differ_in_the_ending_alone_keep_it(tree):
    tree("a/x.png", "a/x.jpg", "a/x_png.jpg", "a/X.nii")
    found = _found("a")
    assert len({stem.lower() for stem in found.values()}) == 4
    assert found["a/x.jpg"] == "x_jpg"
    assert found["a/x_png.jpg"] == "x_png"


def test_a_file_given_twice_is_predicted_once(tree):
    tree("a/x.png", "a/y.png")
    assert list(_found("a/x.png", "a", "./a/x.png")) == ["a/x.png", "a/y.png"]


def test_earlier_results_below_the_input_are_no_inputs(tree):
    tree("x.png", "predictions/x_mask.png")
    assert list(_found(".", out=Path("predictions"))) == ["x.png"]
    assert list(_found("predictions", out=Path("predictions"))) == ["predictions/x_mask.png"]


def test_a_link_to_a_folder_is_followed_and_a_circle_ends(tree):
    tree("store/x.png", "a/y.png")
    os.symlink(Path("store").absolute(), "a/linked")
    os.symlink(Path("a").absolute(), "a/circle")
    assert list(_found("a")) == ["a/y.png", "a/linked/x.png"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["empty"], r"empty holds no pictures \(.jpg, .nii, .nii.gz, .png\)"),
        (["full", "empty"], r"empty holds no pictures"),
        (["full/missing.png"], r"full/missing.png does not exist"),
        ([], r"no pictures given; name files or folders"),
    ],
)
def test_nothing_to_predict_is_an_error(tree, inputs, message):
    tree("full/x.png", "empty/readme.txt")
    with pytest.raises(ValueError, match=message):
        find_inputs([Path(p) for p in inputs], ENDINGS, what="pictures")


@settings(max_examples=60, deadline=None)
@given(
    names=st.lists(
        st.tuples(
            st.sampled_from(["", "a/", "b/", "a/b/", "A/"]),
            st.sampled_from(["x", "X", "x_png", "x_png_2", "x.y", ".x", "x_2"]),
            st.sampled_from([".png", ".PNG", ".jpg", ".nii", ".nii.gz", ""]),
        ),
        min_size=1,
        max_size=12,
        unique=True,
    ),
    as_folder=st.booleans(),
)
def test_no_two_inputs_ever_share_a_result(tmp_path_factory, names, as_folder):
    folder = tmp_path_factory.mktemp("inputs")
    files = [folder / f"{place}{name}{ending}" for place, name, ending in names]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (folder / "a.png").touch()
    found = find_inputs([folder] if as_folder else files, ENDINGS)
    results = [str(item.stem).lower() for item in found]
    assert len(set(results)) == len(results)
    assert not any(item.stem.is_absolute() or ".." in item.stem.parts for item in found)
    if not as_folder:
        assert [item.path for item in found] == files


def test_output_mirrors_the_folders(tmp_path):
    path = InputFile(Path("in/a/x.nii.gz"), Path("a/x")).output(tmp_path / "out", "_mask.nii.gz")
    assert path == tmp_path / "out/a/x_mask.nii.gz"
    assert path.parent.is_dir()


def test_rows_are_written_as_csv_and_json(tmp_path):
    with PredictionTable(tmp_path / "new/out") as table:
        table.add(InputFile(Path("a/ä.png"), Path("ä")), label="größer, klein", score=torch.tensor(0.5))
        table.add(Path("b.png"), box=np.array([1, 2]), score=np.float32("nan"), extra={"k": (1, None)})
    written, document = table.files
    with open(written, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0] == {"file": "a/ä.png", "label": "größer, klein", "score": "0.5", "box": "", "extra": ""}
    assert rows[1] == {"file": "b.png", "label": "", "score": "", "box": "[1, 2]", "extra": '{"k": [1, null]}'}
    assert json.loads(document.read_text(encoding="utf-8")) == [
        {"file": "a/ä.png", "label": "größer, klein", "score": 0.5},
        {"file": "b.png", "box": [1, 2], "score": None, "extra": {"k": [1, None]}},
    ]
    assert sorted(path.name for path in (tmp_path / "new/out").iterdir()) == ["predictions.csv", "predictions.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_rows_before_an_error_are_kept(tmp_path, error):
    def interrupted():
        with PredictionTable(tmp_path) as table:
            table.add(Path("a.png"), label="cat")
            raise error

    with pytest.raises(error):
        interrupted()
    assert json.loads((tmp_path / "predictions.json").read_text()) == [{"file": "a.png", "label": "cat"}]


def test_every_pair_of_value_and_file_is_written(tmp_path):
    values = [True, 3, -0.0, float("inf"), "", None, [], {}, Path("p"), torch.ones(2, 2), np.int64(4)]
    with PredictionTable(tmp_path) as table:
        for value, other in product(values, values):
            table.add(Path("x"), value=value, other=other)
    assert len(json.loads(table.files[1].read_text())) == len(values) ** 2
