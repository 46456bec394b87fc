"""Heat maps over pictures: map, bar, caption, strips."""

from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_tools.pictures import fonts
from vlm_tools.pictures.fonts import writable
from vlm_tools.pictures.overlay import colored, overlay, shrunk, strip


def test_overlay_shows_map_bar_and_caption() -> None:
    heat = torch.zeros(20, 30)
    heat[5:10, 5:10] = 1
    picture = overlay(Image.new("RGB", (30, 20)), heat, "a cat")
    pixels = np.asarray(picture)
    assert picture.size[0] > 240  # eight times the picture, and the bar
    assert pixels[7 * 8, 7 * 8].sum() > pixels[0, 0].sum()
    assert strip([picture] * 7, columns=3).size == (picture.size[0] * 3, picture.size[1] * 3)
    with pytest.raises(ValueError, match="picture is 3×3, the map 30×20"):
        overlay(Image.new("RGB", (3, 3)), heat, "")
    with pytest.raises(ValueError, match="opacity must lie"):
        overlay(Image.new("RGB", (30, 20)), heat, "", opacity=2)
    with pytest.raises(ValueError, match="limits must increase"):
        colored(heat, limits=(1, 0))
    with pytest.raises(ValueError, match="there is no picture"):
        strip([])


def test_pictures_of_any_size_fit_a_page_and_options_count() -> None:
    for width, height in ((4000, 3000), (3, 700), (700, 3), (1, 1), (36, 36)):
        small = shrunk(Image.new("RGB", (width, height), "red"))
        panel = overlay(small, torch.rand(small.height, small.width), "a word", side=260)
        assert strip([panel] * 12).width <= 1100
        assert panel.height <= 300
    heat = torch.zeros(40, 40)
    heat[:20] = 1
    pictures = (overlay(Image.new("RGB", (40, 40)), heat, "", opacity=o) for o in (0.1, 0.9))
    faint, strong = (cast(tuple[int, ...], picture.getpixel((5, 5))) for picture in pictures)
    assert sum(strong) > sum(faint)
    assert overlay(Image.new("RGB", (40, 40)), heat, "", side=400).width > 400
    assert colored(heat, limits=(0, 4)).getpixel((0, 0)) != colored(heat).getpixel((0, 0))


def test_captions_in_any_script_are_drawn_or_spelled_and_cut_off() -> None:
    assert writable("Кошка", 13)[0] == "Кошка"
    shown, _ = writable("\U0010ffff\n", 13)  # a letter that no font has, and one that cannot be printed
    assert shown == "  "
    assert writable("a\U000e0100b", 13)[0].startswith("a")
    heat = torch.rand(20, 20)
    long, short = (overlay(Image.new("RGB", (20, 20)), heat, text) for text in ("word " * 60, "word"))
    assert long.size == short.size


def test_a_letter_without_a_font_is_spelled_and_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(fonts, "_files", tuple)
    fonts._fitting.cache_clear()
    assert writable("a 猫", 13)[0] == "a U+732B"
    assert writable("猫 a", 13)[0] == "U+732B a"
    assert len([record for record in caplog.records if "no installed font" in record.message]) == 1
    fonts._fitting.cache_clear()
