"""Paths over shelves: seen, numbered, and at the size of a page."""

import numpy as np
import torch

from detection.pictures.fonts import counted
from detection.pictures.scanpath import FIXATIONS, PATH, TARGET, TRUTH, draw_path, runs, stacked, wrapped
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
    once, twice = (np.asarray(draw_path(shelf(), path)) for path in ([4], [4, 0, 4, 0, 4]))
    assert ((once == rgb(PATH)).all(2)).sum() > 500
    own = (twice == rgb(PATH)).all(2)[310:]
    assert own.sum() > (once == rgb(PATH)).all(2)[310:].sum()  # 1, 3, 5
    many = (np.asarray(draw_path(shelf(), [4, 0, 4, 2] * 5)) == rgb(PATH)).all(2)
    assert not many[460:, :333].any()  # its numbers stay on the object, in several lines
    assert not many[460:, 668:].any()
    assert many[520:, 500].any()
    other = np.asarray(draw_path(shelf(), [4], color=TRUTH))
    assert (other == rgb(TRUTH)).all(2).any()
    assert not (other == rgb(PATH)).all(2).any()
    assert np.asarray(draw_path(shelf(3000, 2000), [0])).shape == (3000, 2000, 3)


def test_numbers_that_follow_each_other_are_runs_and_lines_keep_to_their_width() -> None:
    assert runs([1, 4, 5, 6, 9, 10]) == ["1", "4–6", "9", "10"]
    assert runs(range(1, 21)) == ["1–20"]
    assert wrapped(["1", "22", "333", "4"], len, 5) == ["1, 22", "333", "4"]
    assert wrapped(["1", "22", "333", "4"], len, 6) == ["1, 22", "333, 4"]
    assert [counted(count, *FIXATIONS) for count in (0, 1, 2)] == ["0 fixations", "1 fixation", "2 fixations"]


def test_pictures_stand_below_each_other_with_their_titles() -> None:
    one, two = draw_path(shelf(), [0]), draw_path(shelf(), [1])
    page = np.asarray(stacked([one, two], ["a title", "猫"]))
    assert page.shape[0] > 2 * 600
    assert (page[: page.shape[0] // 2] == rgb(PATH)).all(2).any()
    assert (page[:24] < 128).all(2).any()  # letters
