"""Paths over shelves: seen, numbered, and at the size of a page."""

import numpy as np
import torch

from detection.pictures.scanpath import PATH, TARGET, TRUTH, draw_path, stacked
from detection.scanpaths.shelves import Shelf, even_boxes


def rgb(color: str) -> list[int]:
    return [int(color[i : i + 2], 16) for i in (1, 3, 5)]


def shelf(height: int = 60, width: int = 100) -> Shelf:
    return Shelf(torch.zeros(3, height, width, dtype=torch.uint8), 2, 3, even_boxes(2, 3, height, width), 5)


def test_the_line_passes_the_objects_in_their_order_and_the_target_is_framed() -> None:
    image = np.asarray(draw_path(shelf(), [0, 2, 5]))
    assert image.shape == (600, 1000, 3)
    line, frame = ((image == rgb(color)).all(2) for color in (PATH, TARGET))
    assert line[150, 170:830].mean() > 0.8  # from the first to the third of the upper row
    assert line[150:450, 833].mean() > 0.8
    assert line[450, 100:600].sum() == 0
    assert frame[302, 670:820].all()
    assert not frame[:300].any()


def test_repeated_objects_and_single_fixations_are_drawn_and_other_colors_used() -> None:
    once, twice = (np.asarray(draw_path(shelf(), path)) for path in ([4], [4, 4, 4]))
    assert ((once == rgb(PATH)).all(2)).sum() > 500
    assert ((twice == rgb(PATH)).all(2)).sum() > ((once == rgb(PATH)).all(2)).sum()  # 1, 2, 3
    other = np.asarray(draw_path(shelf(), [4], color=TRUTH))
    assert (other == rgb(TRUTH)).all(2).any()
    assert not (other == rgb(PATH)).all(2).any()
    assert np.asarray(draw_path(shelf(3000, 2000), [0])).shape == (3000, 2000, 3)


def test_pictures_stand_below_each_other_with_their_titles() -> None:
    one, two = draw_path(shelf(), [0]), draw_path(shelf(), [1])
    page = np.asarray(stacked([one, two], ["a title", "猫"]))
    assert page.shape[0] > 2 * 600
    assert (page[: page.shape[0] // 2] == rgb(PATH)).all(2).any()
    assert (page[:24] < 128).all(2).any()  # letters
