"""ActivityNet and THUMOS-14 from small folders, and what is refused by name."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detection.data.activities import ActivityNet, Thumos14, find_features, read_features, rescale

RECORD: dict[str, Any] = {"duration": 20.0, "subset": "training",
                          "annotations": [{"segment": [2.0, 12], "label": "Diving"}]}  # fmt: skip


def write(folder: Path, database: Any) -> Path:
    file = folder / "anet.json"
    file.write_text(json.dumps({"database": database, "taxonomy": [], "version": "1.3"}), encoding="utf-8-sig")
    return file


def test_activitynet_gives_windows_of_whole_videos(tmp_path: Path) -> None:
    other = {"duration": 10, "subset": "validation", "annotations": [{"segment": [0, 5], "label": "Archery"}]}
    short = {**RECORD, "feature_frame": 300, "duration_frame": 400}
    file = write(
        tmp_path, {"a": RECORD, "b": other, "c": short, "gone": RECORD, "calm": {**RECORD, "annotations": None}}
    )
    rows = np.arange(24.0).reshape(6, 4)
    np.save(tmp_path / "a.npy", rows)
    np.save(tmp_path / "calm.npy", rows.astype(np.int32))
    np.savetxt(tmp_path / "v_c.csv", rows, delimiter=",", header="f0,f1,f2,f3", comments="")
    data = ActivityNet(file, tmp_path, "train", steps=6, skip_missing=True)
    assert data.classes == ["Archery", "Diving"]
    items = {item["video"]: item for item in (data[i] for i in range(len(data)))}
    assert set(items) == {"a", "c", "calm"}
    torch.testing.assert_close(items["a"]["features"], torch.from_numpy(rows.T).float())
    torch.testing.assert_close(items["c"]["features"], items["a"]["features"])
    assert (items["a"]["duration"], items["c"]["duration"]) == (20, 15)  # features end early
    assert items["a"]["truth"].labels.tolist() == [1]
    assert items["c"]["overlaps"].max() == pytest.approx(9.5 / 10.5)  # 2 to 12 s beside 2.5 to 12.5 s
    assert not items["calm"]["overlaps"].any()
    assert ActivityNet(file, tmp_path, steps=3, skip_missing=True)[0]["features"].shape == (4, 3)
    given = ActivityNet(file, tmp_path, skip_missing=True, classes=["Diving", "Archery"])
    assert given[0]["truth"].labels.tolist() == [0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"duration": 0}, "video 'a': 'duration' must be seconds above 0, got 0"),
        ({"duration": None}, "video 'a': 'duration' must be seconds above 0, got None"),
        ({"annotations": [{"segment": [5, 2], "label": "x"}]}, "video 'a': annotation 0 must have 'segment'"),
        ({"annotations": [{"segment": [5], "label": "x"}]}, "video 'a': annotation 0 must have 'segment'"),
        ({"annotations": [{"segment": [1, 2]}]}, "video 'a': annotation 0 must have 'segment'"),
        ({"annotations": [7]}, "video 'a': annotation 0 must have 'segment'"),
        ({"subset": "validation"}, "no videos of subset 'training' with features"),
        ({}, "no features of video 'a' (a.npy, v_a.npy, or .csv)"),
    ],
)
def test_records_that_are_wrong_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = write(tmp_path, {"a": {**RECORD, **change}})
    with pytest.raises(ValueError, match=re.escape(message)):
        ActivityNet(file, tmp_path)


def test_files_that_are_wrong_are_named(tmp_path: Path) -> None:
    bad, text = tmp_path / "bad.json", tmp_path / "x.npy"
    bad.write_text("[")
    with pytest.raises(ValueError, match="not a json file"):
        ActivityNet(bad, tmp_path)
    bad.write_text("[]")
    with pytest.raises(ValueError, match="must be an object with 'database'"):
        ActivityNet(bad, tmp_path)
    with pytest.raises(ValueError, match="split must be 'train', 'val' or 'test', got split='all'"):
        ActivityNet(bad, tmp_path, "all")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="class 'Diving' is none of the 1 in classes"):
        ActivityNet(write(tmp_path, {"a": RECORD}), tmp_path, classes=["Rowing"])
    text.write_text("nothing")
    for content, message in (
        (None, "features cannot be read"),
        (np.zeros(5), r"features must be (T, F) numbers, got (5,) float64"),
        (np.zeros((0, 4)), "features must be (T, F) numbers, got (0, 4)"),
        (np.full((2, 4), np.nan), "features must be finite"),
        (np.array([["a"]]), "features must be (T, F) numbers"),
    ):
        if content is not None:
            np.save(text, content)
        with pytest.raises(ValueError, match=re.escape(f"{text}: {message}")):
            read_features(text)
    assert find_features(tmp_path, "nobody") is None


def test_rescaling_is_linear_between_the_middles_of_steps() -> None:
    features = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    assert rescale(features, 4) is features
    assert rescale(features, 2).tolist() == [[0.5, 2.5]]
    assert rescale(features[:, :1], 3).tolist() == [[0, 0, 0]]


def test_thumos_gives_windows_that_overlap_by_half(tmp_path: Path) -> None:
    marks, features = tmp_path / "marks", tmp_path / "features"
    for folder in (marks, features):
        folder.mkdir()
    (marks / "Diving_val.txt").write_text("v1  0.5 2.5\nv1 7.0 9.0\n\n")
    (marks / "Archery_val.txt").write_text("v2 0 1\n")
    (marks / "Ambiguous_val.txt").write_text("v2 3 4\n")
    (marks / "Diving_test.txt").write_text("v3 0.1 0.2\n")
    for name, rows in (("v1", 25), ("v2", 6), ("v3", 30)):
        np.save(features / f"{name}.npy", np.arange(rows * 4.0).reshape(rows, 4))
    data = Thumos14(marks, features, snippet=0.5, steps=8)
    assert data.classes == ["Archery", "Diving"]
    windows = [(item["video"], item["window"]) for item in (data[i] for i in range(len(data)))]
    # v1: rows 0…7, (4…11, touched by 0.5 to 2.5 s), 8…, 12…, 16…, 20…; those without an event are left out
    assert windows == [("v1", (0, 4)), ("v1", (2, 6)), ("v1", (4, 8)), ("v1", (6, 10)), ("v1", (8, 12)), ("v2", (0, 4))]
    assert data[0]["truth"].labels.tolist() == [1, 1]
    assert data[5]["truth"].segments.tolist() == [[0, 1]]
    assert data[5]["features"][:, 6:].abs().max() == 0
    assert data[0]["duration"] == 12.5
    test = Thumos14(marks, features, "test", snippet=0.5, steps=8)
    assert [item["window"][0] for item in (test[i] for i in range(len(test)))] == [0, 2, 4, 6, 8, 10, 12]
    (marks / "Diving_val.txt").write_text("v1 0.5\n")
    with pytest.raises(ValueError, match=r"line 1 must be a video, start and end, got 'v1 0\.5'"):
        Thumos14(marks, features)
    (marks / "Diving_val.txt").write_text("v1 5 2\n")
    with pytest.raises(ValueError, match="line 1 must end after it starts"):
        Thumos14(marks, features)
    for arguments, message in (
        ((tmp_path, features), "no files <Class>_val.txt"),
        ((marks, features, "val"), "split must be 'train' or 'test', got split='val'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            Thumos14(*arguments)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="snippet must be above 0, steps at least 2, got 0 and 128"):
        Thumos14(marks, features, snippet=0)
