"""Shelves of digits, the program that searches them, and shelves out of json."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from detection.scanpaths.searchers import grid_cells
from detection.scanpaths.shelves import (
    SPLITS,
    DigitShelves,
    collate_shelves,
    crops_of,
    even_boxes,
    next_object,
    read_shelf,
    search,
    write_shelf,
)

CELLS = grid_cells(3, 9)[0].double().numpy()


def test_items_are_made_again_from_their_seeds_and_searches_are_whole() -> None:
    data: Any = DigitShelves("val", limit=12)
    assert len(list(data)) == 12
    assert len(DigitShelves("test")) == 200
    again = DigitShelves("val")[3]
    assert all(torch.equal(torch.as_tensor(again[k]), torch.as_tensor(data[3][k])) for k in again)
    for item in data:
        assert item["crops"].shape == (27, 3, 32, 24)
        assert item["likeness"][item["target"]].item() == pytest.approx(1)
        assert item["likeness"].abs().max() <= 1 + 1e-6
        assert 1 <= len(item["path"]) <= 20
    batch = collate_shelves([data[0], data[1]])
    assert batch["path"].shape == (2, max(len(data[0]["path"]), len(data[1]["path"])))
    assert batch["crops"].shape == (2, 27, 3, 32, 24)
    with pytest.raises(ValueError, match="split must be 'train', 'val' or 'test', got split='all'"):
        DigitShelves("all")  # pyright: ignore[reportArgumentType]


def test_splits_share_no_glyph() -> None:
    ranges = sorted((low, high) for low, high, _, _ in SPLITS.values())
    assert all(end <= start for (_, end), (start, _) in pairwise(ranges))


def test_the_program_is_drawn_to_what_is_alike_and_near_and_ends_at_the_target() -> None:
    likeness = np.full(27, 0.1)
    likeness[13] = 1.0
    start = next_object(likeness, CELLS, 13, [])
    assert start[-1] == 0
    assert start.argmax() == 13  # the middle
    for path in ([], [0], [0, 1], [13]):
        assert next_object(likeness, CELLS, 13, path).sum() == pytest.approx(1)
    assert next_object(likeness, CELLS, 13, [13])[-1] == pytest.approx(0.92)
    there = next_object(likeness, CELLS, 13, [0])
    assert there[-1] == pytest.approx(0.015)
    assert there[0] == pytest.approx(0.985 * 0.08)
    assert there[1] > there[2] > there[3]
    back = next_object(likeness, CELLS, 13, [1, 0])
    assert back[1] < there[1] / 10  # it was visited
    closer = likeness.copy()
    closer[2] = 0.9
    assert next_object(closer, CELLS, 13, [0])[2] > 5 * there[2]


def test_searches_follow_the_chances() -> None:
    likeness = np.linspace(0, 1, 27)
    draws = [search(np.random.RandomState(k), likeness, CELLS, 26) for k in range(800)]
    chances = next_object(likeness, CELLS, 26, [])
    first = np.bincount([path[0] for path in draws], minlength=27) / 800
    assert np.abs(first - chances[:27]).max() < 0.06
    assert max(map(len, draws)) <= 20


def test_a_shelf_survives_its_json_and_is_cut_into_its_objects(tmp_path: Path) -> None:
    data = DigitShelves("val", limit=1)
    write_shelf(data.shelf(0), tmp_path / "a.json")
    shelf = read_shelf(tmp_path / "a.json")
    assert torch.equal(shelf.picture, data.shelf(0).picture)
    assert shelf.path == tuple(data[0]["path"].tolist())
    assert (shelf.rows, shelf.columns, shelf.target) == (3, 9, data[0]["target"])
    torch.testing.assert_close(crops_of(shelf, (32, 24)), data[0]["crops"])
    assert crops_of(shelf, (16, 40)).shape == (27, 3, 16, 40)


def test_shelves_without_boxes_are_divided_evenly(tmp_path: Path) -> None:
    Image.fromarray(np.arange(40 * 60, dtype=np.uint8).reshape(40, 60)).save(tmp_path / "s.png")
    (tmp_path / "s.json").write_text(json.dumps({"picture": "s.png", "rows": 2, "columns": 3, "target": 5}))
    shelf = read_shelf(tmp_path / "s.json")
    assert shelf.path == ()
    assert shelf.boxes.tolist() == [[0, 0, 20, 20], [20, 0, 40, 20], [40, 0, 60, 20],
                                    [0, 20, 20, 40], [20, 20, 40, 40], [40, 20, 60, 40]]  # fmt: skip
    assert torch.equal(shelf.boxes, even_boxes(2, 3, 40, 60))


GOOD: dict[str, Any] = {"picture": "s.png", "rows": 1, "columns": 2, "target": 0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"picture": None}, "must be an object with 'picture', the name of a file beside it"),
        ({"picture": "gone.png"}, "gone.png"),
        ({"rows": "2"}, "'rows' must be an integer in 1…1000, got '2'"),
        ({"columns": True}, "'columns' must be an integer in 1…1000, got True"),
        ({"target": 2}, "'target' must be an integer in 0…1, got 2"),
        ({"target": None}, "'target' must be an integer in 0…1, got None"),
        ({"path": [0, 2]}, "'path' must be a list of objects in 0…1, got [0, 2]"),
        ({"rows": 40}, "40 × 2 objects do not fit into 8×8 pixels (Y×X)"),
        ({"boxes": [[0, 0, 4, 4]]}, "'boxes' must be a list of 2 boxes, got [[0, 0, 4, 4]]"),
        (
            {"boxes": [[0, 0, 4, 4], [4, 0, 4, 8]]},
            "'boxes' 1 must be x0, y0, x1, y1 within 8×8 pixels, got [4, 0, 4, 8]",
        ),
        ({"boxes": [[0, 0, 4, 4], [4, 0, 9, 8]]}, "'boxes' 1 must be x0, y0, x1, y1 within 8×8 pixels"),
        ({"boxes": [[0, 0, 4, float("nan")], [4, 0, 8, 8]]}, "'boxes' 0 must be x0, y0, x1, y1"),
    ],
)
def test_what_is_wrong_in_a_shelf_is_named_with_its_file(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "s.png")
    file = tmp_path / "s.json"
    file.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        read_shelf(file)
    assert str(tmp_path) in str(caught.value)


def test_files_that_are_no_json_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\xff\xfe\x00nonsense")
    (tmp_path / "b.json").write_text("[]")
    for name, message in (("a", "not a json file"), ("b", "must be an object"), ("c", "not a json file")):
        with pytest.raises(ValueError, match=rf"{name}\.json: {message}"):
            read_shelf(tmp_path / f"{name}.json")
