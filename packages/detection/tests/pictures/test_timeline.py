"""Timelines show truth and proposals where they are."""

import numpy as np
from PIL import ImageColor

from detection.metrics.events import Events
from detection.pictures.boxes import GAP
from detection.pictures.timeline import COLORS, HEAD, ROW, SIDE, TRUTH, WIDTH, below, draw_timeline


def test_bars_stand_where_events_are_and_the_best_come_first() -> None:
    truth = Events(np.array([[20.0, 40.0]]), labels=np.array([1]))
    found = Events(np.array([[60.0, 80.0], [-5.0, 30.0]]), np.array([0.2, 0.9]), np.array([0, 1]))
    page = np.asarray(draw_timeline("one", truth, found, 80.0, ["dive", "猫"]))

    def span(row: int, color: str) -> list[float]:
        line = page[HEAD + row * ROW + 3]
        inside = np.flatnonzero((line == ImageColor.getrgb(color)).all(1))
        return [round((x - SIDE - GAP) / (WIDTH - SIDE - 2 * GAP) * 80, 0) for x in (inside.min(), inside.max())]

    assert span(0, TRUTH) == [20, 40]
    assert span(1, COLORS[1]) == [0, 30]
    assert span(2, COLORS[0]) == [60, 80]
    assert draw_timeline("one", truth, found, 80.0, shown=1).height == len(page) - ROW
    assert below([draw_timeline("x", truth, Events(np.zeros((0, 2))), 80.0)] * 2).height > 2 * HEAD
