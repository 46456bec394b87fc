"""Where a network looked: a picture over the slide's thumbnail or its coordinates, and tiles for QuPath."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np

Scale = Literal["rank", "linear"]
LONGEST = 1000  # pixels of a map's longer side
FAINT = 0.15  # opacity of the least attended patch over a thumbnail; the most attended one has 0.75


def side_of_patches(places: np.ndarray, side: float | None) -> float:
    """The side of a patch: what a file says, else the smallest distance of two columns or rows of patches.

    Shapes: places (N, 2).
    """
    if side is not None and side > 0:
        return side
    gaps = np.concatenate([np.diff(np.unique(axis)) for axis in places.T])
    return float(gaps.min()) if len(gaps) else 1.0


def shades(values: np.ndarray, scale: Scale) -> np.ndarray:
    """Values as shades in [0, 1]: their rank, ties at the mean rank, or their share of the largest.

    Attention is steep: by rank a map shows the order of all patches, linearly often a few of them.
    """
    if scale == "linear":
        return values / max(float(values.max()), np.finfo(float).tiny)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks = np.cumsum(counts) - (counts + 1) / 2
    return ranks[inverse] / max(1, len(values) - 1)


def painted(places: np.ndarray, side: float, values: np.ndarray, step: float, size: tuple[int, int]) -> np.ndarray:
    """Values on a grid of pixels of ``step`` by ``step``, the mean where patches overlap, NaN where none is.

    Shapes: places (N, 2), values (N,) → (height, width) of ``size``.
    """
    total, count = np.zeros(size), np.zeros(size)
    begin = np.floor(places / step).astype(int)
    end = np.maximum(np.ceil((places + side) / step).astype(int), begin + 1)
    for (left, top), (right, bottom), value in zip(begin, end, values, strict=True):
        total[top:bottom, left:right] += value
        count[top:bottom, left:right] += 1
    return np.divide(total, count, out=np.full(size, np.nan), where=count > 0)


def draw_heatmap(
    path: Path,
    places: np.ndarray,
    side: float,
    values: np.ndarray,
    *,
    title: str,
    label: str = "attention",
    scale: Scale = "rank",
    thumbnail: Path | None = None,
    downsample: float | None = None,
) -> None:
    """Write a PNG.

    Args:
        places: upper left corners (N, 2), X and Y in pixels of the largest level.
        side: of a patch, in the same pixels.
        values: (N,), at least 0.
        title: the heading.
        label: what the values are.
        scale: of the colors, see `shades`.
        thumbnail: a small picture of the whole slide, drawn below.
        downsample: pixels of the largest level to one of the thumbnail.

    Raises: ValueError if the thumbnail cannot be read, patches lie outside of it, or ``downsample`` is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from attn_core.lettering import lettered
    from attn_core.pictures import read_picture

    picture = None if thumbnail is None else read_picture(thumbnail).rgb()
    if picture is None:
        low = places.min(0)
        step = float((places.max(0) - low + side).max()) / LONGEST
        step = max(step, side / 40)  # a handful of patches is no poster
        step = side / max(1, round(side / step))  # whole pixels to a patch where it has several
        places = places - low
        width, height = (int(np.ceil(x)) for x in (places.max(0) + side) / step)
    else:
        height, width = picture.shape[:2]
        if downsample is None:
            raise ValueError(f"{thumbnail}: the features' file does not say how large the slide is; give --downsample, "
                             "pixels of its largest level to one of the thumbnail")  # fmt: skip
        reach = float(((places.max(0) + side) / (width, height)).max())
        if reach > downsample * 1.02:
            raise ValueError(f"{thumbnail}: at {downsample:g} pixels to one of its {width}×{height} patches lie "
                             f"outside; they need --downsample {reach:.4g} or more")  # fmt: skip
        step = downsample
    shade = painted(places, side, shades(values, scale), step, (height, width))
    with lettered([title, label]) as (heading, name):
        inches = 9.0 / max(width, height)
        figure = Figure(figsize=(max(3.5, width * inches + 1.2), max(2.0, height * inches + 0.6)), layout="constrained")
        FigureCanvasAgg(figure)
        axis = figure.subplots()
        if picture is not None:
            axis.imshow(picture)
        opacity = 1.0 if picture is None else np.nan_to_num(FAINT + 0.6 * shade)
        colors = "inferno" if picture is None else "jet"
        drawn: Any = axis.imshow(np.ma.masked_invalid(shade), cmap=colors, vmin=0, vmax=1, interpolation="nearest")
        drawn.set_alpha(opacity)
        axis.set_axis_off()
        axis.set_title(heading, fontsize=10)
        bar: Any = figure.colorbar(drawn, ax=axis, shrink=0.8)
        bar.set_label(f"rank of {name}" if scale == "rank" else f"{name}, share of the largest ({values.max():.2g})")
        bar.solids.set_alpha(1.0)
        figure.savefig(path, dpi=100)


def write_tiles(
    path: Path,
    places: np.ndarray,
    side: float,
    values: np.ndarray,
    *,
    label: str = "attention",
    most: int | None = None,
) -> int:
    """Write patches as tiles of QuPath (GeoJSON), each with its value and rank as measurements; returns their number.

    In QuPath: drag the file onto the open slide, then Measure → Show measurement maps.

    Args:
        most: write only so many of the most attended patches; None writes all.
    """
    ranks = shades(values, "rank")
    order = np.argsort(-values, kind="stable")[:most]
    with path.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [\n')
        for place, index in enumerate(order):
            left, top = (float(x) for x in places[index])
            right, bottom = left + side, top + side
            corners = [[left, top], [right, top], [right, bottom], [left, bottom], [left, top]]
            measured = [
                {"name": label, "value": float(values[index])},
                {"name": f"{label} rank", "value": round(float(ranks[index]), 6)},
            ]
            tile = {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [corners]},
                "properties": {"objectType": "tile", "measurements": measured},
            }
            file.write(json.dumps(tile) + (",\n" if place + 1 < len(order) else "\n"))
        file.write("]}\n")
    return len(order)
