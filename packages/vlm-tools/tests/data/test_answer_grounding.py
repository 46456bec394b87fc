"""Readers of answer grounding: masks in every form, scores at the mask's size; refusals by file and record."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_tools.data.answer_grounding import (
    AnswerGroundings,
    Grounded,
    mean_iou,
    read_masks,
    read_vizwiz,
    read_vqs,
    unpacked_runs,
)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with a picture of 6×8 pixels, ``a.jpg``, red on its left half."""
    folder = tmp_path / "images"
    folder.mkdir()
    shown = np.zeros((6, 8, 3), dtype=np.uint8)
    shown[:, :4, 0] = 255
    Image.fromarray(shown).save(folder / "a.png")
    return folder


def written(file: Path, content: Any) -> Path:
    file.write_text(json.dumps(content))
    return file


CORNERS = [{"x": 1, "y": 1}, {"x": 3, "y": 1}, {"x": 3, "y": 4}, {"x": 1, "y": 4}]
BOX = np.zeros((6, 8), dtype=bool)
BOX[1:5, 1:4] = True


def test_vizwiz_is_read_from_polygons_and_from_masks(images: Path, tmp_path: Path) -> None:
    record = {"question": "what is this?", "answers": ["tea", "mug", "mug"], "answer_grounding": CORNERS,
              "height": 6, "width": 8}  # fmt: skip
    file = written(tmp_path / "v.json", {"a.png": record})
    (found,) = read_vizwiz(file, images)
    assert (found.question, found.answer, found.picture) == ("what is this?", "mug", images / "a.png")
    assert np.array_equal(found.mask, BOX)
    sizeless = {**record, "height": None, "most_common_answer": "cup"}
    (other,) = read_vizwiz(written(tmp_path / "v.json", {"a.png": sizeless}), images)
    assert other.answer == "cup"
    assert np.array_equal(other.mask, BOX)  # of the picture's own size
    (tmp_path / "masks").mkdir()
    Image.fromarray(~BOX).convert("L").save(tmp_path / "masks" / "a.png")
    (masked,) = read_vizwiz(file, images, tmp_path / "masks")
    assert np.array_equal(masked.mask, ~BOX)
    (none,) = read_vizwiz(written(tmp_path / "v.json", {"a.png": {**record, "answer_grounding": []}}), images)
    assert not none.mask.any()


def test_records_name_their_masks_or_are_found_by_number(images: Path, tmp_path: Path) -> None:
    Image.fromarray(BOX).convert("L").save(tmp_path / "17.png")
    Image.fromarray(BOX).save(tmp_path / "own.png")
    rows = [{"question": "q", "image": "a.png", "question_id": 17, "answer": 3},
            {"question": "q", "image": "a.png", "mask": "own.png"}]  # fmt: skip
    found = read_masks(written(tmp_path / "r.json", rows), images, tmp_path)
    assert all(np.array_equal(one.mask, BOX) for one in found)
    assert [one.answer for one in found] == ["3", ""]
    numbered = written(tmp_path / "d.json", {"17": {"question": "q", "image": "a.png"}})
    (by_number,) = read_masks(numbered, images, tmp_path)
    assert np.array_equal(by_number.mask, BOX)


def test_vqs_joins_polygons_and_runs_of_coco(images: Path, tmp_path: Path) -> None:
    runs = [6, 6, 36]  # the second column
    packed = "".join(chr(48 + n) for n in (6, 6, 4 + 32, 1))  # 36 = 4 + 32·1, the third run: not a difference yet
    coco = {"images": [{"id": 5, "file_name": "a.png", "height": 6, "width": 8}], "annotations": [
        {"id": 1, "image_id": 5, "segmentation": [[1, 1, 3, 1, 3, 4, 1, 4]]},
        {"id": 2, "image_id": 5, "segmentation": {"size": [6, 8], "counts": runs}},
        {"id": 3, "image_id": 5, "segmentation": {"size": [6, 8], "counts": packed}},
        {"id": 4, "image_id": 6, "segmentation": [[1, 1, 3, 1, 3, 4]]}]}  # fmt: skip
    instances = written(tmp_path / "i.json", coco)
    column = np.zeros((6, 8), dtype=bool)
    column[:, 1] = True
    rows = [{"question": "q", "annotation_ids": ids} for ids in ([1], [2], [3], [1, 2])]
    found = read_vqs(written(tmp_path / "l.json", rows), instances, images)
    for one, mask in zip(found, (BOX, column, column, BOX | column), strict=True):
        assert np.array_equal(one.mask, mask)
    for ids in ([9], [], None, [1, 4]):
        with pytest.raises(ValueError, match=r"l\.json: record 0: annotation"):
            read_vqs(written(tmp_path / "l.json", [{"question": "q", "ann_ids": ids}]), instances, images)


def test_packed_runs_are_differences_from_the_fourth_on() -> None:
    # 3, 40, 5, 40 + 2, 5 − 1: groups of 5 bits, lowest first, 32 where more follow, 16 the sign of the last
    groups = [3, 8 + 32, 1, 5, 2, 31]
    assert unpacked_runs("".join(chr(48 + n) for n in groups)) == [3, 40, 5, 42, 4]
    with pytest.raises(ValueError, match=r"^unpacked_runs: the text ends within a number"):
        unpacked_runs(chr(48 + 40))
    with pytest.raises(ValueError, match=r"^unpacked_runs: '\\x1f' is no group"):
        unpacked_runs("\x1f")


def test_items_are_of_one_size_and_their_text_is_chosen(images: Path) -> None:
    record = Grounded(images / "a.png", "where", "left", polygons=(((0, 0), (3, 0), (3, 5), (0, 5)),))
    item = AnswerGroundings([record], 12)[0]
    assert item["image"].shape == (3, 12, 12)
    assert item["text"].shape == (384,)
    assert float(item["mask"].mean()) == 0.5
    assert torch.equal(item["mask"][0] > 0, item["image"][0] > 0.5)
    encoded: list[Any] = []
    encode = lambda texts: encoded.extend(texts) or torch.ones(len(texts), 2)  # noqa: E731
    for text in ("question", "question and answer"):
        assert AnswerGroundings([record], 4, encode=encode, text=text)[0]["text"].tolist() == [1, 1]  # type: ignore[arg-type]
    assert encoded == ["where", "where left"]
    assert len(AnswerGroundings([record, record])) == 2
    with pytest.raises(ValueError, match=r"^AnswerGroundings: needs records and a side, got 1 records, side=0"):
        AnswerGroundings([record], 0)
    with pytest.raises(ValueError, match=r"^AnswerGroundings: text must be 'question' or 'question and answer'"):
        AnswerGroundings([record], text="answer")  # type: ignore[arg-type]


def test_iou_is_taken_at_the_truths_size() -> None:
    record = Grounded(Path("x"), "q", polygons=(((0, 0), (3, 0), (3, 5), (0, 5)),), size=(6, 8))
    nothing = Grounded(Path("x"), "q", size=(6, 8))
    half = np.zeros((3, 4), dtype=bool)
    half[:, :2] = True
    assert mean_iou([half], [record]) == 1.0
    assert mean_iou([half, np.zeros((6, 8), dtype=bool)], [nothing, nothing]) == 0.5
    with pytest.raises(ValueError, match=r"^mean_iou: mask 0 must be bool \(Y, X\), got float64 \(3, 4\)"):
        mean_iou([half * 1.0], [record])
    with pytest.raises(ValueError, match=r"^mean_iou: there is no mask"):
        mean_iou([], [])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected a dict by picture, got a list"),
        ({"a": {}}, "a: question must be a text, got None"),
        ({"a": 3}, "a: question must be a text"),
        ({"a": {"question": "q", "answer_grounding": [{"x": None, "y": 1}]}}, "a: answer_grounding must be a list of"),
    ],
)
def test_odd_annotations_are_named(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_vizwiz(written(tmp_path / "v.json", content), tmp_path)


def test_files_and_masks_that_are_not_there_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json: no JSON"):
        read_vizwiz(tmp_path / "bad.json", tmp_path)
    for content, message in ((3, "expected a list of records"), ([3], "record 0 is a int, not a dict"),
                             ([{"question": "q", "image": "a"}], r"record 0: there is no mask .*0\.png")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            read_masks(written(tmp_path / "r.json", content), tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"expected COCO's images and annotations"):
        read_vqs(tmp_path / "r.json", tmp_path / "r.json", tmp_path)
    short = Grounded(tmp_path, "q", runs=((5,),), size=(2, 2))
    with pytest.raises(ValueError, match=r"runs of 5 pixels do not fill 2×2"):
        assert short.mask is None
