"""``detection check``: all findings at once, and silence where nothing is wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detection.commands.check import check


def write(root: Path, name: str, pictures: dict[str, tuple[int, int]], *, seed: int = 0, **changes: Any) -> Path:
    """A split of pictures of noise, given as (width, height), each with one object of class 1."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(seed)
    images, records = [], []
    for number, (file, (width, height)) in enumerate(pictures.items(), 1):
        Image.fromarray(draw.integers(0, 255, (height, width, 3), np.uint8)).save(folder / file)
        images.append({"id": number, "file_name": file, "width": width, "height": height})
        records.append({"id": number, "image_id": number, "category_id": 1, "bbox": [1, 1, 5, 5], "area": 25})
    categories = [{"id": 1, "name": "cat"}]
    made = {"images": images, "annotations": records, "categories": categories} | changes
    (folder / "_annotations.coco.json").write_text(json.dumps(made))
    return folder


def said(data: Path, **options: Any) -> tuple[list[str], str]:
    """Printed lines, and the error at the end."""
    lines: list[str] = []
    try:
        for line in check(data, **options):
            lines.append(line)
    except ValueError as error:
        return lines, str(error)
    return lines, ""


def test_a_sound_set_has_no_finding(tmp_path: Path) -> None:
    write(tmp_path, "train", {"a.png": (60, 40)})
    write(tmp_path, "valid", {"b.png": (60, 40)}, seed=1)
    lines, error = said(tmp_path)
    assert (lines[-1], error) == ("nothing is wrong", "")
    assert "  1 pictures, 1 objects, 1 categories" in lines


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    train = write(tmp_path, "train", {"a.png": (60, 40), "b.png": (60, 40), "c.jpg": (60, 40)})
    exif = Image.Exif()
    exif[274] = 6
    Image.open(train / "c.jpg").save(train / "c.jpg", exif=exif)
    (train / "b.png").write_bytes((train / "b.png").read_bytes()[:200])
    content = json.loads((train / "_annotations.coco.json").read_text())
    content["images"][0]["width"] = 99
    content["annotations"] += [
        {"id": 9, "image_id": 1, "category_id": 5, "bbox": [1, 1, 5, 5]},
        {"id": 10, "image_id": 2, "category_id": 1, "bbox": None},
        {"id": 11, "image_id": 3, "category_id": 1, "bbox": [1, 1, 9, 9], "area": None},
    ]
    (train / "_annotations.coco.json").write_text(json.dumps(content))
    (train / "extra.png").write_bytes((train / "a.png").read_bytes())
    valid = write(tmp_path, "valid", {"v.png": (60, 40)}, annotations=[],
                  categories=[{"id": 1, "name": "cat"}, {"id": 2, "name": "zebra"}])  # fmt: skip
    (valid / "v.png").write_bytes((train / "a.png").read_bytes())
    lines, error = said(tmp_path)
    text = "\n".join(lines)
    for part in (
        "refused: image 0 (id=1, 'a.png') is 99×40 in the json, its file is 60×40",
        "refused: annotation 3 has category_id=5, which is not in the list",
        "refused: annotation 4 has the box None",
        "b.png: the picture is damaged",
        "repaired: 1 areas are null or no numbers",
        "repaired: 1 pictures are turned by EXIF; their boxes were turned with them",
        "remark: 1 pictures in ",
        "remark: no picture has an object",
        "across splits: categories of val are not those of train: only here: 'zebra'",
        "across splits: 1 pictures in two splits are the same file",
    ):
        assert part in text, part
    assert error == f"8 findings in {tmp_path}"


def test_one_json_and_its_pictures_elsewhere_are_checked(tmp_path: Path) -> None:
    folder = write(tmp_path, "all", {"a.png": (60, 40)})
    file = (folder / "_annotations.coco.json").rename(tmp_path / "labels.json")
    assert said(file)[0][2].startswith("  refused: 1 of 1 image files are missing")
    assert said(file, images=folder)[0][-1] == "nothing is wrong"


def test_misuse_is_named(tmp_path: Path) -> None:
    wrong: list[tuple[Path, dict[str, Any], str]] = [
        (tmp_path / "none", {}, "none does not exist"),
        (tmp_path, {}, "holds no COCO data set"),
        (tmp_path, {"labels": "ids"}, "--labels must be contiguous or category_id, got ids"),
        (tmp_path, {"turned": "left"}, "--turned must be auto, upright or stored, got left"),
    ]
    for data, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            list(check(data, **options))
