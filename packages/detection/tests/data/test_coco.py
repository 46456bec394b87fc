"""Data: digits_coco bit for bit, COCO json with everything wrong in it, transforms that move boxes with pixels."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detection.data import CocoDetection, DetectionTransform, DigitsCoco, collate_detection
from detection.data.coco import read_image
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


def save(root: Path, what: Any) -> None:
    (root / "train" / "_annotations.coco.json").write_text(what if isinstance(what, str) else json.dumps(what))


def test_val_digits_have_the_published_hashes_and_counts() -> None:
    made = pictures("val")  # raises if a byte differs
    assert (len(made), sum(len(boxes) for _, boxes, _ in made)) == (200, 862)
    item = DigitsCoco("val", limit=3)[2]
    assert item["image"].shape == (3, 128, 128)
    assert item["boxes"].shape == (len(item["labels"]), 4)
    with pytest.raises(ValueError, match="split must be 'train', 'val' or 'test'"):
        DigitsCoco("validation")  # pyright: ignore


def test_written_digits_read_as_the_same_pictures_and_boxes(tmp_path: Path) -> None:
    write_coco(tmp_path, "val")
    read, made = CocoDetection(tmp_path, split="val", transform={"short_sides": ()}), DigitsCoco("val")
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
    assert "numbered anew" in text
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
        ({"images": []}, "it has no list 'annotations'"),
        (content(images=[]), "the list of images is empty"),
        (content(categories=[]), "the list of categories is empty"),
        (content(categories=[{"id": 1}]), "lacks id, name or file_name"),
        (content(images=[{"id": 1, "file_name": "a.png"}] * 2), "1 image ids appear more than once"),
        (content(images=[{"id": 7, "file_name": "c.png"}]), "1 of 1 image files are missing"),
        (content(annotations=[{"image_id": 7}]), "annotation 0 lacks"),
        (content(annotations=[{"image_id": 5, "category_id": 9, "bbox": [0, 0, 1, 1]}]), "image_id=5, which is not"),
        (content(annotations=[{"image_id": 7, "category_id": 1, "bbox": [0, 0, 1, 1]}]), "category_id=1, which is not"),
        (content(annotations=[{"image_id": 7, "category_id": 9, "bbox": [0, 0, 1, float("nan")]}]), "has the box"),
    ],
)
def test_what_cannot_be_repaired_is_refused_by_name(root: Path, what: Any, message: str) -> None:
    save(root, what)
    with pytest.raises(ValueError, match=message):
        CocoDetection(root)


def test_wrong_folders_classes_and_pictures_are_named(root: Path) -> None:
    with pytest.raises(ValueError, match=r"holds neither val/_annotations\.coco\.json"):
        CocoDetection(root, split="val")
    with pytest.raises(ValueError, match="has 2 classes"):
        CocoDetection(root, num_classes=1)
    with pytest.raises(ValueError, match="give either root and split, or annotations"):
        CocoDetection()
    save(root, content(annotations=[]))
    with pytest.raises(ValueError, match="no image has an object"):
        CocoDetection(root, skip_empty=True)
    (root / "train" / "b.png").write_bytes((root / "train" / "a.png").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"b\.png: the image is damaged"):
        CocoDetection(root)[1]
    (root / "text.png").write_text("text")
    with pytest.raises(ValueError, match="not an image"):
        read_image(root / "text.png")
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
