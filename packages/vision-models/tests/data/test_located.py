"""Readers of CUB-200-2011 and of ImageNet's boxes, on small folders of their layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from vision_models.data.located import CUB, ImageNetBoxes


def picture(file: Path, width: int = 100, height: int = 50) -> None:
    """Black but for a white rectangle from (20, 10) to (60, 30)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[10:30, 20:60] = 255
    Image.fromarray(pixels).save(file)


@pytest.fixture
def cub(tmp_path: Path) -> Path:
    root = tmp_path / "CUB_200_2011"
    names = ["001.Crow/a.png", "002.Gull/b.png", "002.Gull/c.png"]
    for name in names:
        picture(root / "images" / name)
    tables = {
        "images": names,
        "train_test_split": ["1", "0", "0"],
        "image_class_labels": ["1", "2", "2"],
        "classes": ["001.Crow", "002.Gull"],
        "bounding_boxes": ["20.0 10.0 40.0 20.0"] * 3,
    }
    for name, rows in tables.items():
        (root / f"{name}.txt").write_text("".join(f"{i + 1} {row}\n" for i, row in enumerate(rows)))
    return root


def bright(image: torch.Tensor) -> list[int]:
    rows, columns = (image[0] > 0.2).nonzero(as_tuple=True)
    return [int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1]


def test_boxes_follow_the_picture_through_resizing_and_cutting(cub: Path) -> None:
    data = CUB(cub, "test", size=64, resize=80)
    assert (len(data), data.metainfo["classes"]) == (2, ["001.Crow", "002.Gull"])
    item: Any = data[1]
    assert (item["label"], item["image"].shape) == (1, (3, 64, 64))
    assert item["boxes"].tolist() == [[8, 8, 40, 40]]  # 20·.8 − 8, 10·1.6 − 8, 60·.8 − 8, 30·1.6 − 8
    assert np.abs(np.subtract(bright(item["image"]), [8, 8, 40, 40])).max() <= 1
    whole: Any = CUB(cub.parent, "test", size=80, resize=80)[0]
    assert whole["boxes"].tolist() == [[16, 16, 48, 48]]
    train = CUB(cub, "train", size=64, resize=80)
    assert "boxes" not in train[0]
    assert len({tuple(bright(train[0]["image"])) for _ in range(6)}) > 1


@pytest.mark.parametrize(
    ("table", "text", "message"),
    [
        ("bounding_boxes", "1 0 0 9 9\n2 1 1 0 4\n3 1 1 2 2\n", r"the box of picture 2 has no area: '1 1 0 4'"),
        ("bounding_boxes", "1 0 0 9 9\n2 1 one 0 4\n3 1 1 2 2\n", r"picture 2 has no four numbers but '1 one 0 4'"),
        ("bounding_boxes", "1 0 0 9 9\n2 1 1 4 4\n", r"bounding_boxes.txt: picture 3 of images.txt is missing"),
        ("image_class_labels", "1 1\n2 7\n3 2\n", r"picture 2 has class '7', which classes.txt does not name"),
        ("train_test_split", "1\n", r"train_test_split.txt: expected a number and a value in each line, got '1'"),
    ],
)
def test_odd_tables_of_cub_are_named(cub: Path, table: str, text: str, message: str) -> None:
    (cub / f"{table}.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        CUB(cub, "test")


def test_missing_data_are_named(tmp_path: Path, cub: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no images.txt; give the folder that CUB_200_2011.tgz unpacks to"):
        CUB(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="CUB: split must be 'train' or 'test', got split='val'"):
        CUB(cub, "val")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="CUB: size must be from 1 to resize=256, got size=300"):
        CUB(cub, size=300)


def annotation(file: Path, boxes: list[tuple[int, int, int, int]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    names = ("xmin", "ymin", "xmax", "ymax")
    objects = "".join(
        "<object><bndbox>" + "".join(f"<{n}>{v}</{n}>" for n, v in zip(names, box, strict=True)) + "</bndbox></object>"
        for box in boxes
    )
    file.write_text(f"<annotation>{objects}</annotation>")


def test_imagenet_reads_all_boxes_and_names_what_is_missing(tmp_path: Path) -> None:
    for part, name in (("train", "n1/x.png"), ("train", "n2/y.png"), ("val", "n2/v1.png"), ("val", "n1/v2.png")):
        picture(tmp_path / part / name)
    boxes = tmp_path / "boxes"
    annotation(boxes / "deep" / "v1.xml", [(20, 10, 60, 30), (0, 0, 10, 10)])
    with pytest.raises(ValueError, match=r"has no v2.xml for .*v2.png"):
        ImageNetBoxes(tmp_path, "val", annotations=boxes)
    annotation(boxes / "v2.xml", [(50, 0, 100, 50), (5, 5, 5, 9)])
    data = ImageNetBoxes(tmp_path, "val", annotations=boxes, size=80, resize=80)
    items: list[Any] = [data[0], data[1]]
    assert [item["label"] for item in items] == [0, 1]
    assert items[1]["boxes"].tolist() == [[16, 16, 48, 48], [0, 0, 8, 16]]
    assert items[0]["boxes"].tolist() == [[40, 0, 79, 79]] * 2  # cut at the border; the first again
    assert len(ImageNetBoxes(tmp_path, "train")) == 2
    annotation(boxes / "v2.xml", [(5, 5, 5, 9)])
    with pytest.raises(ValueError, match=r"v2.xml has no box with an area"):
        ImageNetBoxes(tmp_path, "val", annotations=boxes)
    (boxes / "v2.xml").write_text("<annotation>")
    with pytest.raises(ValueError, match=r"v2.xml is no annotation of boxes"):
        ImageNetBoxes(tmp_path, "val", annotations=boxes)
    with pytest.raises(ValueError, match="split='val' needs annotations=, the folder of the XML files"):
        ImageNetBoxes(tmp_path, "val")
    with pytest.raises(ValueError, match=r"nowhere needs the folders train and val"):
        ImageNetBoxes(tmp_path / "nowhere")
