"""Boxes in pictures: lines that are seen, names in any script, sheets that fit a page."""

import numpy as np
import pytest
import torch

from detection.pictures import fonts
from detection.pictures.boxes import COLORS, Boxes, as_picture, beside, draw, sheet
from detection.pictures.fonts import writable


def rgb(color: str) -> list[int]:
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


def test_lines_are_two_pixels_wide_or_more_and_colored_by_class() -> None:
    for side, width in ((400, 2), (1500, 5)):
        pixels = torch.zeros(3, side, side, dtype=torch.uint8)
        image = np.asarray(draw(pixels, Boxes(torch.tensor([[100.0, 100, 300, 300]]), [3], ["x"])))
        assert image.shape == (side, side, 3)
        assert (image[200, 95:120] == rgb(COLORS[3])).all(1).sum() == width


def test_small_pictures_are_enlarged_and_texts_stay_inside() -> None:
    image = np.asarray(draw(torch.zeros(3, 96, 128, dtype=torch.uint8), Boxes(torch.tensor([[90.0, 0, 127, 95]]), [0],
                                                                              ["a long name: 99 %"])))  # fmt: skip
    assert image.shape == (288, 384, 3)
    assert (image > 200).all(2).sum() > 50  # white letters


def test_a_sheet_has_both_sides_at_the_size_of_a_page() -> None:
    for size in ((3, 2000, 3000), (3, 64, 64), (3, 900, 100)):
        pixels = torch.zeros(size, dtype=torch.uint8)
        height, width = size[1:]
        box = torch.tensor([[width / 4, height / 4, width / 2, height / 2]])
        page = sheet([(pixels, Boxes(box, [0], ["a"]), Boxes(box, [1], ["b"]))] * 6, [("truth", "prediction")] * 6)
        assert page.width <= 1100
        found = np.asarray(page)
        middle = page.width // 2
        assert (found[:, :middle] == rgb(COLORS[0])).all(2).sum() > 6 * 2 * 20
        assert (found[:, middle:] == rgb(COLORS[1])).all(2).sum() > 6 * 2 * 20


def test_what_a_detector_sees_stands_on_the_right_and_beside_the_input() -> None:
    dark = torch.zeros(3, 64, 64, dtype=torch.uint8)
    none = Boxes(torch.zeros(0, 4), [], [])
    seen = as_picture(torch.full((3, 32, 32), 1.7), (64, 64))
    assert seen.shape == dark.shape
    assert (seen == 255).all()
    assert (as_picture(torch.full((3, 8, 8), -0.5), (8, 8)) == 0).all()
    row = np.asarray(beside(draw(dark, none), draw(seen, none)))
    assert row.shape == (384, 2 * 384 + 6, 3)
    assert row[:, :384].max() == 0
    assert row[:, -384:].min() == 255
    page = np.asarray(sheet([(dark, none, none, seen), (dark, none, none)], [("truth", "prediction")] * 2))
    middle, half = page.shape[1] // 2, page.shape[0] // 2
    black = (page == 0).all(2)
    cell = 384**2
    assert black[:half, :middle].sum() > 0.9 * cell
    assert black[:half, middle:].sum() < 0.1 * cell
    assert black[half:, middle:].sum() > 0.9 * cell


def test_names_in_any_script_are_written_or_spelled_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for text in ("Straße", "кошка", "γάτα", "قطة"):
        assert writable(text, 12)[0] == text
    monkeypatch.setattr(fonts, "_installed", lambda: ())
    fonts._font.cache_clear()
    shown, font = writable("猫 cat", 12)
    assert shown == "U+732B cat"
    assert font.getlength(shown) > 20
    assert "no installed font has '猫'" in caplog.text
    fonts._font.cache_clear()
