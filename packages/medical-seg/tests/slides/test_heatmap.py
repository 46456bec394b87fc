"""Heat maps: where a patch is painted, its rank, and the tiles that QuPath reads."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medical_seg.slides.heatmap import draw_heatmap, painted, shades, side_of_patches, write_tiles

PLACES = np.array([[0, 0], [512, 0], [0, 256], [256, 512]])
VALUES = np.array([0.1, 0.6, 0.1, 0.2])


def test_patches_are_painted_where_they_lie_and_averaged_where_they_overlap() -> None:
    grid = painted(PLACES, 256, VALUES, 256, (3, 3))
    expected = np.array([[0.1, np.nan, 0.6], [0.1, np.nan, np.nan], [np.nan, 0.2, np.nan]])
    assert np.array_equal(grid, expected, equal_nan=True)
    both = painted(np.array([[0, 0], [1, 0]]), 2, np.array([1.0, 3.0]), 1, (2, 3))
    assert np.array_equal(both, [[1, 2, 3], [1, 2, 3]])
    small = painted(np.array([[300, 0]]), 10, np.array([1.0]), 100, (1, 4))  # less than a pixel is one
    assert np.array_equal(np.isnan(small), [[True, True, True, False]])


def test_shades_are_ranks_or_shares_of_the_largest() -> None:
    assert shades(VALUES, "rank") == pytest.approx([1 / 6, 1, 1 / 6, 2 / 3])
    assert shades(VALUES, "linear") == pytest.approx([1 / 6, 1, 1 / 6, 1 / 3])
    assert shades(np.zeros(3), "linear").max() == 0
    assert shades(np.array([0.3]), "rank").tolist() == [0]


def test_the_side_is_the_file_s_or_the_smallest_step() -> None:
    assert side_of_patches(PLACES, 300.0) == 300
    assert side_of_patches(PLACES, None) == 256
    assert side_of_patches(PLACES[:1], None) == 1


def test_tiles_are_closed_polygons_with_measurements_strongest_first(tmp_path: Path) -> None:
    assert write_tiles(tmp_path / "a.geojson", PLACES, 256, VALUES) == 4
    held = json.loads((tmp_path / "a.geojson").read_text())
    assert held["type"] == "FeatureCollection"
    first = held["features"][0]
    assert first["geometry"] == {
        "type": "Polygon",
        "coordinates": [[[512, 0], [768, 0], [768, 256], [512, 256], [512, 0]]],
    }
    assert first["properties"]["objectType"] == "tile"
    assert {m["name"]: m["value"] for m in first["properties"]["measurements"]} == {
        "attention": 0.6,
        "attention rank": 1,
    }
    assert write_tiles(tmp_path / "b.geojson", PLACES, 256, VALUES, label="x", most=2) == 2
    kept = json.loads((tmp_path / "b.geojson").read_text())["features"]
    assert [tile["properties"]["measurements"][0] for tile in kept] == [
        {"name": "x", "value": 0.6},
        {"name": "x", "value": 0.2},
    ]


def test_the_strongest_patch_is_the_brightest_on_the_picture(tmp_path: Path) -> None:
    draw_heatmap(tmp_path / "a.png", PLACES, 256, VALUES, title="slide")
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    assert max(picture.shape) <= 1100
    light = np.argwhere((abs(picture - [252, 255, 164]) < 12).all(2))  # the end of inferno
    left = light[light[:, 1] < 0.8 * picture.shape[1]].mean(0) / picture.shape[:2]
    assert left[0] < 0.45  # the upper right corner of the map
    assert left[1] > 0.5


def test_a_thumbnail_needs_its_scale_and_must_hold_the_patches(tmp_path: Path) -> None:
    Image.fromarray(np.full((24, 24, 3), 200, np.uint8)).save(tmp_path / "t.png")
    given = {"title": "slide", "thumbnail": tmp_path / "t.png"}
    draw_heatmap(tmp_path / "a.png", PLACES, 256, VALUES, downsample=32.0, scale="linear", **given)
    assert (tmp_path / "a.png").stat().st_size > 5000
    with pytest.raises(
        ValueError, match=r"t\.png: at 16 pixels to one of its 24×24 patches lie outside; .* 32 or more"
    ):
        draw_heatmap(tmp_path / "a.png", PLACES, 256, VALUES, downsample=16.0, **given)
    with pytest.raises(ValueError, match=r"does not say how large the slide is; give --downsample"):
        draw_heatmap(tmp_path / "a.png", PLACES, 256, VALUES, **given)
