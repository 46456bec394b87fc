"""Five splits: every slide tested once, patients together, files of others checked."""

import json
import logging
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from medical_seg.slides.bags import SlideBags
from medical_seg.slides.folder import SlideSet, open_slides
from medical_seg.slides.splits import make_split, read_split, split_of_table


def write_set(path: Path, count: int = 40, *, extra: str = "") -> Path:
    path.mkdir()
    rows = ["case_id,slide_id,label" + (",split_info" if extra else "")]
    for k in range(count):
        with h5py.File(path / f"s{k:02d}.h5", "w") as file:
            file["features"] = np.full((3 + k % 4, 2), k, np.float32)
        rows.append(f"p{k // 4},s{k:02d},{(k // 4) % 2}" + (f",{extra.split()[k % 3]}" if extra else ""))
    (path / "t.csv").write_text("\n".join(rows))
    return path


@pytest.fixture(scope="module")
def slides(tmp_path_factory: pytest.TempPathFactory) -> SlideSet:
    return open_slides([write_set(tmp_path_factory.mktemp("splits") / "data")])


def test_every_slide_is_tested_once_and_patients_stay_together(slides: SlideSet) -> None:
    splits = [make_split(slides, number) for number in range(1, 6)]
    assert sorted(name for split in splits for name in split["test"]) == [slide.name for slide in slides.slides]
    for split in splits:
        cases = {part: {slides.cases[name] for name in names} for part, names in split.items()}
        assert not cases["train"] & cases["test"]
        assert not cases["train"] & cases["val"]
        assert not cases["val"] & cases["test"]
        assert {part: len(names) for part, names in split.items()} == {"train": 24, "val": 8, "test": 8}
        for names in split.values():
            labels = [slides.labels[name] for name in names]
            assert sum(labels) * 2 == len(labels)  # classes are shared out evenly
    backwards = SlideSet(slides.slides[::-1], slides.classes, slides.labels, slides.cases)
    assert make_split(backwards, 3) == splits[2]


def test_a_part_of_a_split_reads_its_slides_and_no_other(slides: SlideSet) -> None:
    folder = slides.slides[0].path.parent
    parts: list[Any] = [SlideBags(str(folder), part, split=2) for part in ("train", "val", "test")]
    assert [len(part) for part in parts] == [24, 8, 8]
    assert [slide.name for slide in parts[2].slides] == make_split(slides, 2)["test"]
    item = parts[2][0]
    assert item["features"][0, 0] == int(parts[2].slides[0].name[1:])
    assert item["label"] == slides.labels[parts[2].slides[0].name]
    few = SlideBags(str(folder), "train", most=2)
    assert {len(few[k]["features"]) for k in range(24)} == {2}
    assert len(SlideBags(str(folder), "val", most=2)[0]["features"]) > 2  # training bags alone
    wrong: Any = (({"part": "x"}, "part must be"), ({"part": "train", "most": 0}, "most must be at least 1"))
    for options, words in wrong:
        with pytest.raises(ValueError, match=words):
            SlideBags(str(folder), **options)
    with pytest.raises(ValueError, match="no slides given; use -d FOLDER"):
        SlideBags([], "train")


def test_files_of_acmil_and_of_clam_give_the_same_split(slides: SlideSet, tmp_path: Path) -> None:
    wanted = make_split(slides, 1)
    (tmp_path / "split_1.json").write_text(json.dumps({f"{part}_names": names for part, names in wanted.items()}))
    assert read_split(tmp_path, slides, 1) == wanted
    longest = max(map(len, wanted.values()))
    rows = [[*names, *[""] * (longest - len(names))] for names in wanted.values()]
    lines = [",train,val,test", *(f"{k},{','.join(row)}" for k, row in enumerate(zip(*rows, strict=True)))]
    (tmp_path / "splits_1.csv").write_text("\n".join(lines))
    assert read_split(tmp_path, slides, 2) == wanted
    assert read_split(tmp_path / "splits_1.csv", slides, 5) == wanted


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"train_names": ["s00"], "val_names": ["s01"]}, r"test_names must be a list of slides, got NoneType"),
        ({"train_names": ["s00"], "val_names": ["s01"], "test_names": []}, "no slide is in the part 'test'"),
        ({"train_names": ["s00"], "val_names": ["s99"], "test_names": ["s02"]}, "'s99' of the part 'val' is not in"),
        (
            {"train_names": ["s00"], "val_names": ["s01"], "test_names": ["s00"]},
            "'s00' stands in 'train' and in 'test'",
        ),
        ([], "expected an object with train_names"),
        ("{", "not a split file"),
    ],
)
def test_a_split_that_does_not_fit_is_refused_by_name(held: Any, words: str, slides: SlideSet, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(held if isinstance(held, str) else json.dumps(held))
    with pytest.raises(ValueError, match=rf"a\.json: .*{words}"):
        read_split(tmp_path / "a.json", slides, 1)


def test_a_patient_on_both_sides_of_others_splits_is_told(
    slides: SlideSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"train_names": ["s00"], "val_names": ["s04"], "test_names": ["s01"]}))
    with caplog.at_level(logging.WARNING):
        read_split(file, slides, 1)
    assert "slides of case 'p0' stand in several parts" in caplog.text


def test_the_table_s_own_parts_serve_where_it_has_them(tmp_path: Path) -> None:
    found = open_slides([write_set(tmp_path / "a", 6, extra="training val test")])
    assert split_of_table(found) == {"train": ["s00", "s03"], "val": ["s01", "s04"], "test": ["s02", "s05"]}
    assert [slide.name for slide in SlideBags(str(tmp_path / "a"), "test", split=4).slides] == ["s02", "s05"]
    with pytest.raises(ValueError, match="split_info of slide 's02' is 'x'; expected train, val or test"):
        split_of_table(open_slides([write_set(tmp_path / "b", 6, extra="train val x")]))


def test_what_cannot_be_split_is_refused(slides: SlideSet, tmp_path: Path) -> None:
    few = open_slides([write_set(tmp_path / "a", 8)])
    with pytest.raises(ValueError, match="split 1 trains on no slide of class 0; give splits"):
        make_split(few, 1)
    for number in (0, 6):
        with pytest.raises(ValueError, match=f"--split: there are splits 1 to 5, got {number}"):
            make_split(slides, number)
    with pytest.raises(ValueError, match=r"holds neither split_3\.json nor splits_2\.csv"):
        read_split(tmp_path, slides, 3)
