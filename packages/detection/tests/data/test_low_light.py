"""Pictures in the dark: digits from a seed, ExDark and DARK FACE as they are distributed."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detection.data import DarkDigitsCoco, DarkFace, DigitsCoco, ExDark
from detection.data.digits_coco_dark import darken

GREY = np.full((64, 96, 3), 180, np.uint8)


def test_dark_digits_keep_boxes_and_splits_and_are_made_again_from_their_seeds() -> None:
    dark: Any = DarkDigitsCoco("val", limit=3)
    light: Any = DigitsCoco("val", limit=3)
    for own, bright in zip(dark, light, strict=True):
        assert own["annotations"] == bright["annotations"]
        assert (own["boxes"] == bright["boxes"]).all()
        assert own["image"].mean() < 0.4 * bright["image"].mean()
    again = DarkDigitsCoco("val", limit=2)
    assert all((again[k]["image"] == dark[k]["image"]).all() for k in range(2))
    assert (dark[0]["image"] * 255 % 1 < 1e-3).float().mean() > 0.9  # stored as 8 bits
    assert dark.metainfo == light.metainfo


def test_darkness_is_gamma_light_and_noise_as_specified() -> None:
    """Written out for one picture: the linear light, its noise from the legacy generator, and back."""
    pixels = np.random.RandomState(7).randint(0, 256, (16, 12, 3)).astype(np.uint8)
    linear = (pixels / 255) ** 2.2 * 0.06
    grain = np.random.RandomState(42).standard_normal(pixels.shape)
    noisy = linear + grain * (linear * 0.002 + 4e-6) ** 0.5
    expected = np.floor(np.maximum(noisy, 0).clip(0, 1) ** (1 / 2.2) * 255 + 0.5)
    found = darken(pixels, 42, vignette=0.0)
    assert np.abs(found - expected).max() <= 1  # a number at half a level may round either way on another machine
    assert (found == expected).mean() > 0.99


@pytest.mark.parametrize("option", ["light", "noise", "vignette"])
def test_each_option_of_the_darkness_changes_what_it_says(option: str) -> None:
    plain: dict[str, Any] = {"light": 0.1, "noise": 0.0, "vignette": 0.0}
    flat = darken(GREY, 3, **plain).astype(float)
    assert flat.std() == 0
    changed = darken(GREY, 3, **{**plain, option: {"light": 0.4, "noise": 2.0, "vignette": 0.8}[option]}).astype(float)
    if option == "light":
        assert changed.mean() == pytest.approx(flat.mean() * 4 ** (1 / 2.2), abs=1)
    elif option == "noise":
        assert 0.5 < changed.std() < 20
        assert abs(np.median(changed) - np.median(flat)) <= 1
    else:
        corners = changed[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
        assert corners < 0.9 * changed.max() <= 0.9 * flat.max() + 3
        assert changed.max() == flat.max()
        assert not np.array_equal(changed, darken(GREY, 4, **{**plain, "vignette": 0.8}))  # another lens


def test_what_no_light_can_be_is_refused() -> None:
    for option, value, rule in (
        ("light", 1.5, r"in \[0, 1\]"),
        ("vignette", -0.1, "in"),
        ("noise", -1.0, "at least 0"),
    ):
        with pytest.raises(ValueError, match=f"darken: {option} must be {rule}.* got {option}={value}"):
            darken(GREY, 0, **{option: value})


def exdark(root: Path) -> Path:
    """Three pictures as distributed: folders by class, endings in any case, boxes as left, top, width, height."""
    for folder, name, lines in (
        ("Bicycle", "2015_00001.png", ["Bicycle 4 5 10 12 0 0 0 0 0 0 0", "People 20 0 8 30 0 0 0 0 0 0 0"]),
        ("Dog", "2015_05000.JPG", ["dog 0 0 60 60 0 0 0 0 0 0 0"]),
        ("Cup", "2015_04000.jpeg", []),
    ):
        for place in ("ExDark", "ExDark_Annno"):
            (root / place / folder).mkdir(parents=True)
        Image.fromarray(GREY).save(root / "ExDark" / folder / name)
        text = "\n".join(["% bbGt version=3", *lines, ""])
        (root / "ExDark_Annno" / folder / f"{name}.txt").write_text(text)
    (root / "imageclasslist.txt").write_text(
        "Name | Class | Light | In/Out | Train/Val/Test\n".replace(" | ", "|")
        + "2015_00001.png 1 2 1 1\n2015_05000.jpg 9 2 2 1\n2015_04000.jpeg 8 1 1 3\n"
    )
    return root


def test_exdark_is_read_as_it_is_distributed(tmp_path: Path) -> None:
    data = ExDark(exdark(tmp_path), split="train", transform={"short_sides": (32,), "max_size": 64})
    first, second = data
    assert len(data) == 2
    assert data.metainfo["classes"][first["labels"][1]] == "People"
    assert first["annotations"][0] == {"bbox": [4, 5, 10, 12], "category_id": 0, "area": 120, "iscrowd": 0}
    assert first["image"].shape == (3, 32, 48)
    assert first["boxes"].tolist() == [[2, 2.5, 7, 8.5], [10, 0, 14, 15]]
    assert first["original_size"] == (64, 96)
    assert second["labels"].tolist() == [8]
    (empty,) = ExDark(tmp_path, split="test")
    assert empty["boxes"].shape == (0, 4)


def test_dark_face_is_read_and_divided_by_file_names(tmp_path: Path) -> None:
    for folder in ("image", "label"):
        (tmp_path / "DarkFace_Train_2021" / folder).mkdir(parents=True)
    for number in range(20):
        Image.fromarray(GREY).save(tmp_path / "DarkFace_Train_2021" / "image" / f"{number}.png")
        lines = ["2", "10 11 20 25", "30 5 96 64"] if number else ["0"]
        (tmp_path / "DarkFace_Train_2021" / "label" / f"{number}.txt").write_text("\n".join(lines) + "\n")
    splits: Any = {name: DarkFace(tmp_path, split=name) for name in ("train", "val", "test")}  # pyright: ignore[reportArgumentType]
    assert [len(data) for data in splits.values()] == [16, 2, 2]
    names = [picture.path.name for data in splits.values() for picture in data.pictures]
    assert len(set(names)) == 20
    full = next(item for item in splits["train"] if len(item["labels"]))
    assert full["annotations"][1]["bbox"] == [30, 5, 66, 59]
    assert splits["train"].metainfo["classes"] == ["face"]
    label = tmp_path / "DarkFace_Train_2021" / "label"
    (label / "3.txt").write_text("3\n10 11 20 25\n")
    with pytest.raises(ValueError, match=r"3\.txt: announces 3, holds 1 boxes"):
        [DarkFace(tmp_path, split=name) for name in ("train", "val", "test")]  # pyright: ignore[reportArgumentType]
    (label / "3.txt").unlink()
    with pytest.raises(ValueError, match=r"there is no label/3\.txt for .*3\.png"):
        [DarkFace(tmp_path, split=name) for name in ("train", "val", "test")]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("imageclasslist.txt", "2015_00001.png 1 2 1\n", "1: expected name, class, light, place and split, got"),
        (
            "imageclasslist.txt",
            "2015_00009.png 1 2 1 1\n",
            "holds no 2015_00009.png.txt, which imageclasslist.txt names",
        ),
        ("imageclasslist.txt", "2015_00001.png 1 2 1 2\n", "names no picture of split train"),
        ("Bicycle/2015_00001.png.txt", "Bike 1 2 3 4 0\n", "2015_00001.png.txt:1: unknown class 'Bike'"),
        ("Bicycle/2015_00001.png.txt", "Bicycle 1 2 3\n", "1: expected four numbers, got '1 2 3'"),
        ("Bicycle/2015_00001.png.txt", "Bicycle 1 2 nan 4\n", "1: expected four numbers, got '1 2 nan 4'"),
        ("Bicycle/2015_00001.png.txt", "Bicycle 96 2 3 4\n", "box (96.0, 2.0, 99.0, 6.0) (xyxy) lies outside"),
    ],
)
def test_what_is_wrong_in_exdark_is_named_with_file_and_line(
    file: str, text: str, message: str, tmp_path: Path
) -> None:
    root = exdark(tmp_path)
    (root / ("ExDark_Annno" if "/" in file else "") / file).write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        ExDark(root)[0]


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no imageclasslist\.txt; it comes with the annotations"):
        ExDark(tmp_path)
    with pytest.raises(ValueError, match="holds no pictures in a folder 'image'"):
        DarkFace(tmp_path)
    for kind in (ExDark, DarkFace):
        with pytest.raises(
            ValueError, match=f"{kind.__name__}: split must be 'train', 'val' or 'test', got split='all'"
        ):
            kind(tmp_path, split="all")  # pyright: ignore[reportArgumentType]
