"""Heat maps over pictures: map, bar, caption, strips."""

import numpy as np
import pytest
import torch
from PIL import Image

from vlm_tools.pictures.overlay import colored, overlay, strip


def test_overlay_shows_map_bar_and_caption() -> None:
    heat = torch.zeros(20, 30)
    heat[5:10, 5:10] = 1
    picture = overlay(Image.new("RGB", (30, 20)), heat, "a cat")
    pixels = np.asarray(picture)
    assert picture.size[0] > 330
    assert pixels[7 * 12, 7 * 12].sum() > pixels[0, 0].sum()
    assert strip([picture] * 7, columns=3).size == (picture.size[0] * 3, picture.size[1] * 3)
    with pytest.raises(ValueError, match="picture is 3×3, the map 30×20"):
        overlay(Image.new("RGB", (3, 3)), heat, "")
    with pytest.raises(ValueError, match="opacity must lie"):
        overlay(Image.new("RGB", (30, 20)), heat, "", opacity=2)
    with pytest.raises(ValueError, match="limits must increase"):
        colored(heat, limits=(1, 0))
    with pytest.raises(ValueError, match="there is no picture"):
        strip([])
