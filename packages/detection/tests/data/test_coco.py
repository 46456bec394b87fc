"""Data: digits_coco bit for bit, COCO json with everything wrong in it, transforms that move boxes with pixels."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from detection.data import CocoDetection, DetectionTransform, DigitsCoco, coco, collate_detection
from detection.data.coco import read_image
from detection.data.coco_json import read_coco
from detection.data.digits_coco import pictures, write_coco


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "train"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(folder / name)
    save(tmp_path, content())
    return tmp_path


def content(**changes: Any) -> dict[str, Any]:
    record = {"image_id": 7, "category_id": 9, "bbox": [10, 5, 20, 10], "area": 200, "iscrowd": 0}
    return {
        "images": [{"id": 7, "file_name": "a.png", "width": 60, "height": 40},
                   {"id": 8, "file_name": "b.png", "width": 60, "height": 40}],
        "annotations": [{**record, "id": 0}, {**record, "id": 1, "category_id": 3, "bbox": [50, 30, 20, 20]},
                        {**record, "id": 1, "bbox": [3, 3, 0, 5]}, {**record, "id": 4, "iscrowd": 1}],
        "categories": [{"id": 9, "name": "cat"}, {"id": 3, "name": "dog"}],
    } | changes  # fmt: skip


def one(*records: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """`content` with one annotation, or several, changed; ``images`` and ``categories`` change the lists."""
    lists = {key: changes.pop(key) for key in ("images", "categories") if key in changes}
    record = {"id": 1, "image_id": 7, "category_id": 9, "bbox": [10, 5, 20, 10], "area": 200, "iscrowd": 0}
    return content(annotations=[{**record, **own, **changes} for own in records or ({},)], **lists)


def save(root: Path, what: Any) -> None:
    (root / "train" / "_annotations.coco.json").write_text(what if isinstance(what, str) else json.dumps(what))


def test_val_digits_have_the_published_hashes_and_counts() -> None:
    made = pictures("val")  # raises if a byte differs
    assert (len(made), sum(len(boxes) for _, boxes, _ in made)) == (200, 862)
    item = DigitsCoco("val", limit=3)[2]
    assert item["image"].shape == (3, 128, 128)
    assert item["boxes"].shape == (len(item["labels"]), 4)
    with pytest.raises(ValueError, match="split must be 'train', 'val' or 'test'"):
        DigitsCoco("validation")  # pyright: ignore[reportArgumentType]


def test_written_digits_read_as_the_same_pictures_and_boxes(tmp_path: Path) -> None:
    write_coco(tmp_path, "val", limit=8)
    read, made = CocoDetection(tmp_path, split="val", transform={"short_sides": ()}), DigitsCoco("val")
    assert len(read) == 8
    assert read.metainfo["classes"] == made.metainfo["classes"]
    for index in (0, 7):
        for key in ("image", "boxes", "labels"):
            torch.testing.assert_close(read[index][key], made[index][key])


def test_faults_of_annotations_are_repaired_and_told(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        data = CocoDetection(root, transform={"short_sides": ()})
    text = caplog.text
    assert "1 boxes reached over the border" in text
    assert "1 boxes without area" in text
    assert "annotation ids were missing, repeated or below 1 and were numbered anew" in text
    item = data[0]
    assert data.metainfo["classes"] == ["dog", "cat"]
    assert item["labels"].tolist() == [1, 0]
    assert item["boxes"][1].tolist() == [50, 30, 60, 40]
    assert [record["iscrowd"] for record in item["annotations"]] == [0, 0, 1]
    assert collate_detection([item, data[1]])["image_id"] == [7, 8]
    raw = CocoDetection(root, labels="category_id")
    assert raw[0]["labels"].tolist() == [9, 3]
    assert len(raw.metainfo["classes"]) == 10
    assert len(CocoDetection(root, skip_empty=True)) == 1


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("{", "not a json file"),
        ("[" * 100_000, "not a json file"),
        ("5", "it has no list 'images'"),
        ({"images": []}, "it has no list 'annotations'"),
        (content(categories=None), "it has no list 'categories'"),
        (content(images=[]), "the list of images is empty"),
        (content(categories=[]), "the list of categories is empty"),
        (content(categories=[{"id": 1}]), "category 0 lacks id or name: id=1, name=None"),
        (content(categories=[7]), "category 0 is 7, not a record"),
        (content(categories=[{"id": 3, "name": "dog"}, {"id": "3", "name": "cat"}]), "id=3 is both 'dog' and 'cat'"),
        (content(images=[None]), "image 0 is None, not a record"),
        (content(images=[{"id": True, "file_name": "a.png"}]), "image 0 lacks id or file_name: id=True"),
        (content(images=[{"id": 7, "file_name": None}]), "image 0 lacks id or file_name: id=7, file_name=None"),
        (content(images=[{"id": 7, "file_name": n} for n in ("a.png", "b.png")]), "image id=7 appears twice: 'a.png'"),
        (content(images=[{"id": i, "file_name": "a.png"} for i in (7, 8)]), "is the picture of two ids, 7 and 8"),
        (content(images=[{"id": 7, "file_name": "c.png"}]), "1 of 1 image files are missing in .*: 'c.png'"),
        (content(images=[{"id": 7, "file_name": "a" * 300}]), "1 of 1 image files are missing"),
        (content(images=[{"id": 7, "file_name": "a.png", "width": 80, "height": 40}]), "80×40 in the json.* 60×40"),
        (content(annotations=["x"]), "annotation 0 is 'x', not a record"),
        (content(annotations=[{"image_id": 7}]), "annotation 0 lacks image_id or category_id"),
        (content(annotations=[{"image_id": 5, "category_id": 9, "bbox": [0, 0, 1, 1]}]), "image_id=5, which is not"),
        (
            content(annotations=[{"image_id": 7, "category_id": -1, "bbox": [0, 0, 1, 1]}]),
            "category_id=-1, which is not",
        ),
        (one(bbox=[0, 0, 1, float("nan")]), r"has the box \[0, 0, 1, nan\]; it must be four finite numbers"),
        (one(bbox=[1, 2, 3]), "must be four finite numbers"),
        (one(bbox=None), "has the box None"),
        (one(bbox={"x": 1}), "must be four finite numbers"),
        (one(bbox=["1", "2", "wide", "4"]), "must be four finite numbers"),
        (one(iscrowd=2), "iscrowd=2; it must be 0 or 1"),
        (one({"bbox": [0.1, 0.1, 0.2, 0.3]}, {"bbox": [3, 3, 20, 20]}), "looks like shares of the picture"),
        (one(bbox=[0.9, 0.5, 0.2, 0.2]), "centers .as YOLO has them. and corners must be converted"),
    ],
)
def test_what_cannot_be_repaired_is_refused_by_name(root: Path, what: Any, message: str) -> None:
    save(root, what)
    with pytest.raises(ValueError, match=message) as caught:
        CocoDetection(root)
    assert "_annotations.coco.json: " in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("what", "boxes", "note"),
    [
        (one(area=None), [[10, 5, 30, 15]], "1 areas are null or no numbers"),
        (one(area="wide"), [[10, 5, 30, 15]], "1 areas are null or no numbers"),
        (one(area=float("nan"), iscrowd=None), [[10, 5, 30, 15]], "1 values of iscrowd are null"),
        (one(id=-1), [[10, 5, 30, 15]], "ids were missing, repeated or below 1"),
        (one(id=[1]), [[10, 5, 30, 15]], "ids were missing, repeated or below 1"),
        (one(bbox=["10", "5.0", 20, 10]), [[10, 5, 30, 15]], "1 annotations hold numbers as text"),
        (one(image_id="7", category_id="9"), [[10, 5, 30, 15]], "1 annotations hold numbers as text"),
        (one(bbox=[30, 15, -20, -10]), [[10, 5, 30, 15]], "1 boxes had negative sides and were turned over"),
        (one(bbox=[10, 5, 100, 10]), [[10, 5, 60, 15]], "1 boxes reached over the border and were cut off"),
        (one(bbox=[70, 5, 20, 10]), [], "1 boxes without area inside the image were left out"),
        (one({}, {"id": 2}), [[10, 5, 30, 15]], "1 boxes stand twice"),
        (one(bbox=[0.25, 0.25, 0.5, 0.5], area=None), [[15, 10, 45, 30]], "1 boxes are shares of the picture"),
        (one(bbox=[40, 25, 55, 35], area=150), [[40, 25, 55, 35]], "1 boxes are corners"),
        (one(bbox=[40, 25, 55, 35], area=None), [[40, 25, 55, 35]], "1 boxes are corners"),
        (one(bbox=[10, 5, 30, 15], area=200), [[10, 5, 30, 15]], "1 boxes are corners"),
        (one(bbox=None, segmentation=[[10, 5, 30, 5, 30, 15]]), [[10, 5, 30, 15]], "was taken from their outlines"),
        (one(images=[{"id": 7, "file_name": "a.png"}]), [[10, 5, 30, 15]], "1 images have no width and height"),
        (one(images=[{"id": 7, "file_name": "a.png", "width": "60", "height": 40.0}]), [[10, 5, 30, 15]], ""),
        (one(images=[{"id": 7, "file_name": "a.png", "width": None, "height": -1}]), [[10, 5, 30, 15]], "no width and"),
        (one(images=[{"id": 7, "file_name": "a.png", "width": 40, "height": 60}]), [[10, 5, 30, 15]], "exchanged"),
        (one(images=[{"id": 7, "file_name": "train\\A.PNG"}]), [[10, 5, 30, 15]], "1 files were found under another"),
        (one(images=[{"id": 7, "file_name": "/home/me/a.png"}]), [[10, 5, 30, 15]], "1 files were found under another"),
        (one(images=[{"id": 7, "file_name": "a.png"}] * 2), [[10, 5, 30, 15]], "1 images stand twice and count once"),
        (one(image_id="x", images=[{"id": "x", "file_name": "a.png"}]), [[10, 5, 30, 15]], "numbered from 1"),
        (one(categories=[{"id": "9", "name": "cat"}] * 2), [[10, 5, 30, 15]], "1 categories stand twice"),
    ],
)
def test_odd_fields_are_repaired_with_one_line(
    root: Path, what: Any, boxes: list[Any], note: str, caplog: pytest.LogCaptureFixture
) -> None:
    save(root, what)
    with caplog.at_level(logging.WARNING):
        data = CocoDetection(root, transform={"short_sides": ()})
    assert note in caplog.text
    assert len(caplog.records) == bool(note)
    assert data[0]["boxes"].tolist() == boxes
    assert all(record["area"] > 0 for record in data[0]["annotations"])
    assert isinstance(data[0]["image_id"], int)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_json_is_read_in_every_unicode_encoding(root: Path, encoding: str) -> None:
    text = json.dumps(content(categories=[{"id": 9, "name": "Katze 猫"}, {"id": 3, "name": "dog"}]), ensure_ascii=False)
    (root / "train" / "_annotations.coco.json").write_bytes(text.encode(encoding))
    assert CocoDetection(root).metainfo["classes"] == ["dog", "Katze 猫"]


def phone(root: Path, orientation: int, size: tuple[int, int], *boxes: list[float]) -> None:
    """A picture stored as 60×40 that EXIF turns; the json has ``size``."""
    exif = Image.Exif()
    exif[274] = orientation
    pixels = np.zeros((40, 60, 3), np.uint8)
    pixels[5:15, 10:40] = 255  # stored: x 10…40, y 5…15
    Image.fromarray(pixels).save(root / "train" / "a.png", exif=exif)
    width, height = size
    images = [{"id": 7, "file_name": "a.png", "width": width, "height": height}]
    records = [{"id": i, "image_id": 7, "category_id": 9, "bbox": box} for i, box in enumerate(boxes, 1)]
    save(root, content(images=images, annotations=records))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_box_as_stored_follows_the_picture_that_exif_turns(root: Path, orientation: int) -> None:
    phone(root, orientation, (60, 40), [10, 5, 30, 10], [50, 2, 8, 4])
    item = CocoDetection(root, transform={"short_sides": ()}, turned="auto" if orientation > 4 else "stored")[0]
    rows, columns = (item["image"][0] > 0.5).any(1).nonzero(), (item["image"][0] > 0.5).any(0).nonzero()
    seen = [float(v) for v in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)]
    assert item["boxes"][0].tolist() == seen


def test_boxes_that_fit_the_upright_picture_alone_are_meant_there(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    phone(root, 6, (60, 40), [5, 45, 30, 10])  # below the 40 rows of the stored picture: was "without area"
    with caplog.at_level(logging.WARNING):
        item = CocoDetection(root, transform={"short_sides": ()})[0]
    assert item["boxes"].tolist() == [[5, 45, 35, 55]]
    assert item["original_size"] == (60, 40)
    assert "1 pictures are turned by EXIF and have their size as stored; boxes are meant upright" in caplog.text
    phone(root, 6, (40, 60), [5, 45, 30, 10])
    assert CocoDetection(root, transform={"short_sides": ()})[0]["boxes"].tolist() == [[5, 45, 35, 55]]


def test_turned_pictures_that_contradict_each_other_are_refused_with_the_way_out(root: Path) -> None:
    phone(root, 6, (60, 40), [5, 45, 30, 10], [45, 5, 10, 10])
    assert len(CocoDetection(root)[0]["boxes"]) == 1  # fits neither: as stored, what is outside is left out
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(root / "train" / "b.png", exif=exif)
    images = [{"id": i, "file_name": name, "width": 60, "height": 40} for i, name in ((7, "a.png"), (8, "b.png"))]
    records = [{"id": i, "image_id": i, "category_id": 9, "bbox": box}
               for i, box in ((7, [5, 45, 30, 10]), (8, [45, 5, 10, 10]))]  # fmt: skip
    save(root, content(images=images, annotations=records))
    with pytest.raises(ValueError, match=r"fit the upright one only, those of .* --set turned=upright or"):
        CocoDetection(root)
    data = CocoDetection(root, turned="upright", transform={"short_sides": ()})
    assert [data[0]["boxes"].tolist(), data[1]["boxes"].tolist()] == [[[5, 45, 35, 55]], []]
    with pytest.raises(ValueError, match="turned must be 'auto', 'upright' or 'stored', got turned='left'"):
        CocoDetection(root, turned="left")  # pyright: ignore[reportArgumentType]
    phone(root, 6, (40, 60), [45, 5, 10, 10])
    with pytest.raises(ValueError, match="fit the picture as stored only"):
        CocoDetection(root)


def split(root: Path, name: str, categories: dict[int, str], *, category: int = 9) -> None:
    (root / name).mkdir(exist_ok=True)
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(root / name / "a.png")
    images = [{"id": 7, "file_name": "a.png", "width": 60, "height": 40}]
    records = [{"id": 1, "image_id": 7, "category_id": category, "bbox": [1, 2, 3, 4]}]
    entries = [{"id": key, "name": label} for key, label in categories.items()]
    made = {"images": images, "annotations": records, "categories": entries}
    (root / name / "_annotations.coco.json").write_text(json.dumps(made))


def test_all_splits_number_their_classes_as_training_does(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    split(tmp_path, "train", {9: "square", 3: "circle", 5: "dreieck"})
    split(tmp_path, "valid", {9: "dreieck", 1: "square"})  # other ids, one class without an object
    val = CocoDetection(tmp_path, split="val")
    assert val.metainfo["classes"] == ["circle", "dreieck", "square"]
    assert val[0]["labels"].tolist() == [1]
    assert "it lacks categories of training: 'circle'" in caplog.text
    with pytest.raises(ValueError, match="id 9 is 'dreieck' here and 'square' in training"):
        CocoDetection(tmp_path, split="val", labels="category_id")
    split(tmp_path, "valid", {9: "dreieck", 1: "square", 2: "zebra"})
    with pytest.raises(ValueError, match=r"not those of training .*: only here: 'zebra'; only in training: 'circle'"):
        CocoDetection(tmp_path, split="val")
    file = tmp_path / "valid" / "_annotations.coco.json"
    assert CocoDetection(annotations=file)[0]["labels"].tolist() == [2]  # on its own: by its ids
    with pytest.raises(ValueError, match="only here: 'zebra'"):
        CocoDetection(annotations=file, classes_from=tmp_path / "train" / "_annotations.coco.json")


def test_the_test_folder_is_used_as_test_and_val_where_there_is_none(tmp_path: Path) -> None:
    split(tmp_path, "train", {9: "x"})
    split(tmp_path, "valid", {9: "x"})
    assert CocoDetection(tmp_path, split=("test", "val")).pictures[0].path.parent.name == "valid"
    split(tmp_path, "test", {9: "x"})
    assert CocoDetection(tmp_path, split=("test", "val")).pictures[0].path.parent.name == "test"
    with pytest.raises(ValueError, match="split must be of train, val, test, got split='tset'"):
        CocoDetection(tmp_path, split="tset")


def test_one_json_is_divided_into_splits_that_share_no_picture(tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"images/{i}.png", "width": 6, "height": 4} for i in range(20)]
    (tmp_path / "images").mkdir()
    for i in range(20):
        Image.new("RGB", (6, 4)).save(tmp_path / "images" / f"{i}.png")
    records = [{"id": i, "image_id": i, "category_id": 9, "bbox": [1, 1, 2, 2]} for i in range(20)]
    text = json.dumps(content(images=images, annotations=records))
    (tmp_path / "result.json").write_text(text)
    parts = {name: CocoDetection(tmp_path, split=name, divide=True) for name in ("train", "val", "test")}
    assert [len(part) for part in parts.values()] == [14, 3, 3]
    paths = [{picture.path for picture in part.pictures} for part in parts.values()]
    assert len(set.union(*paths)) == 20
    with pytest.raises(ValueError, match="holds neither train/_annotations"):
        CocoDetection(tmp_path)
    save_few = content(images=images[:2], annotations=[])
    (tmp_path / "result.json").write_text(json.dumps(save_few))
    with pytest.raises(ValueError, match="2 pictures cannot be divided"):
        CocoDetection(tmp_path, divide=True)


def test_ids_that_cannot_number_outputs_are_refused(root: Path) -> None:
    save(root, one(category_id=10**12, categories=[{"id": 10**12, "name": "x"}]))
    assert CocoDetection(root)[0]["labels"].tolist() == [0]
    with pytest.raises(ValueError, match="which cannot number outputs; use labels='contiguous'"):
        CocoDetection(root, labels="category_id")
    with pytest.raises(ValueError, match="labels must be 'contiguous' or 'category_id', got labels='id'"):
        CocoDetection(root, labels="id")  # pyright: ignore[reportArgumentType]


def test_large_sets_are_compared_picture_by_picture(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(root, one(images=[{"id": 7, "file_name": "a.png", "width": 80, "height": 40}]))
    monkeypatch.setattr(coco, "read_coco", partial(read_coco, headers=0))
    data = CocoDetection(root)
    with pytest.raises(ValueError, match=r"a\.png: is 60×40, the json says 80×40"):
        data[0]


NOTHING = st.sampled_from(
    [None, True, -1, 0, 2.5, "", "7", float("nan"), float("inf"), [], {}, 10**30, "\ud800", "a\0b"]
)
ANYTHING = NOTHING | st.recursive(NOTHING, lambda inner: st.lists(inner, max_size=4), max_leaves=4)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_in_any_field_is_read_or_refused_in_one_line(root: Path, data: st.DataObject) -> None:
    what = content()
    for _ in range(data.draw(st.integers(1, 3))):
        part = data.draw(st.sampled_from(["images", "annotations", "categories"]))
        record = data.draw(st.sampled_from(what[part])) if what[part] else None
        if not isinstance(record, dict) or not record:
            continue
        field = data.draw(st.sampled_from(sorted(record)))
        kind = data.draw(st.sampled_from(["value", "remove", "repeat", "list", "box"]))
        if kind == "value":
            record[field] = data.draw(ANYTHING)
        elif kind == "remove":
            del record[field]
        elif kind == "repeat":
            what[part] = [*what[part], dict(record)]
        elif kind == "list":
            what[part] = data.draw(ANYTHING | st.just([]))
            break
        else:
            record["bbox"] = data.draw(st.lists(st.floats() | st.integers() | NOTHING, min_size=3, max_size=5))
    save(root, what)
    assert len(refusal(root).splitlines()) <= 1


def refusal(root: Path) -> str:
    """What the reader says against a data set; if nothing, its items are as items must be."""
    try:
        read = CocoDetection(root, transform={"short_sides": ()})
        items = [read[index] for index in range(len(read))]
    except ValueError as error:
        return str(error)
    for item in items:
        height, width = item["original_size"]
        assert (item["boxes"][:, 2:] > item["boxes"][:, :2]).all()
        assert (item["boxes"] >= 0).all()
        assert (item["boxes"] <= torch.tensor([width, height] * 2)).all()
        assert item["labels"].lt(len(read.metainfo["classes"])).all()
    return ""


def test_wrong_folders_classes_and_pictures_are_named(root: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither valid/_annotations\.coco\.json"):
        CocoDetection(root, split="val")
    with pytest.raises(ValueError, match="has 2 classes"):
        CocoDetection(root, num_classes=1)
    with pytest.raises(ValueError, match="give either root and split, or annotations"):
        CocoDetection()
    save(root, content(annotations=[]))
    with pytest.raises(ValueError, match="no image has an object"):
        CocoDetection(root, skip_empty=True)
    (root / "train" / "b.png").write_bytes((root / "train" / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"b\.png: the picture is damaged"):
        CocoDetection(root)[1]
    (root / "train" / "b.png").write_text("text")
    with pytest.raises(ValueError, match=r"b\.png'\): .*b\.png: not an image"):
        CocoDetection(root)
    with pytest.raises(ValueError, match="not a picture"):
        read_image(root / "train" / "b.png")
    with pytest.raises(ValueError, match="No such file"):
        read_image(root / "absent.png")


def test_boxes_follow_their_pixels_through_every_transform() -> None:
    torch.manual_seed(0)
    image = torch.zeros(3, 300, 400, dtype=torch.uint8)
    image[:, 100:180, 200:320] = 255
    boxes, labels = torch.tensor([[200.0, 100, 320, 180]]), torch.tensor([4])
    for options in ({}, {"augment": True}, {"augment": True, "crop": True}, {"augment": True, "iou_crop": 1.0}):
        transform = DetectionTransform(short_sides=(200, 320), max_size=500, **options)
        for _ in range(4):
            pixels, moved, kept = transform(image, boxes, labels)
            assert pixels.dtype == torch.float32
            assert min(pixels.shape[-2:]) in (200, 320) or max(pixels.shape[-2:]) == 500
            if len(kept):
                inside = pixels[0] > 0.5
                rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
                seen = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
                assert (moved[0] - torch.tensor([float(v) for v in seen])).abs().max() < 3
    with pytest.raises(ValueError, match="flip must be in"):
        DetectionTransform(flip=2.0)
    with pytest.raises(ValueError, match="at most max_size=5"):
        DetectionTransform(short_sides=(8,), max_size=5)
