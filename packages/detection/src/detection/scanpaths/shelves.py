"""Shelves: pictures of objects in rows, one of which is searched; their json, and shelves of digits with a searcher.

``digit_shelves``: 3 × 9 handwritten digits, dark on light, 800 shelves to train, 150 to validate, 200 to test, which
share no glyph. Who searches them is a program, described at `next_object`: it is drawn to what looks like the target
and to what is near, mostly remembers what it saw, and knows the target when it sees it. Nothing about people follows.

Source of the glyphs: E. Alpaydin, C. Kaynak, UCI 1998 (CC BY 4.0). Checked in: ``scanpaths/test_shelves.py``.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from detection.data.coco import read_image
from detection.data.digits_coco import enlarged, load_glyphs
from detection.scanpaths.searchers import grid_cells, padded

Array = NDArray[np.float64]
ROWS, COLUMNS = 3, 9
CROP = (32, 24)  # Y, X of a cell
GLYPH = 20  # side of the digit in it
# glyphs [low, high), shelves, first seed
SPLITS = {"train": (0, 1200, 800, 11_000), "val": (1200, 1500, 150, 12_000), "test": (1500, 1797, 200, 13_000)}
LIKENESS, SIGHT, REACH, MEMORY = 12.0, 3.0, 0.4, 4.0  # of `next_object`
AGAIN, FOUND, TIRED = 0.08, 0.92, 0.015
LONGEST = 20  # fixations


@dataclass(frozen=True)
class Shelf:
    """A shelf of rows × columns objects, counted row by row.

    Attributes:
        picture: (3, Y, X) uint8.
        boxes: of the objects, (P, 4) xyxy in its pixels.
        target: the object that is searched.
        path: objects in the order in which somebody looked at them; empty if nobody did.
    """

    picture: Tensor
    rows: int
    columns: int
    boxes: Tensor
    target: int
    path: tuple[int, ...] = ()


def read_shelf(file: Path) -> Shelf:
    """A shelf from json: ``picture`` (beside the file), ``rows``, ``columns``, ``target``; if wanted ``boxes``,
    ``path``.

    Without boxes the picture is divided evenly. Objects are counted from 0, row by row.

    Raises: ValueError, naming the file and the entry, for one that is missing or does not fit; as `read_image`.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file}: not a json file: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("picture"), str):
        raise ValueError(f"{file}: must be an object with 'picture', the name of a file beside it")
    rows, columns = (_count(file, content, name, 1, 1000) for name in ("rows", "columns"))
    objects = rows * columns
    target = _count(file, content, "target", 0, objects - 1)
    path = content.get("path") or []
    if not isinstance(path, list) or not all(type(place) is int and 0 <= place < objects for place in path):
        raise ValueError(f"{file}: 'path' must be a list of objects in 0…{objects - 1}, got {path!r}")
    picture = read_image(file.parent / content["picture"])
    height, width = picture.shape[1:]
    boxes = content.get("boxes")
    if boxes is None:
        if height < rows or width < columns:
            raise ValueError(f"{file}: {rows} × {columns} objects do not fit into {height}×{width} pixels (Y×X)")
        return Shelf(picture, rows, columns, even_boxes(rows, columns, height, width), target, tuple(path))
    if not isinstance(boxes, list) or len(boxes) != objects:
        raise ValueError(f"{file}: 'boxes' must be a list of {objects} boxes, got {_shown(boxes)}")
    for number, box in enumerate(boxes):
        if not _is_box(box) or box[0] < 0 or box[1] < 0 or box[2] > width or box[3] > height:
            raise ValueError(
                f"{file}: 'boxes' {number} must be x0, y0, x1, y1 within {width}×{height} pixels, got {_shown(box)}"
            )
    return Shelf(picture, rows, columns, torch.tensor(boxes, dtype=torch.float32), target, tuple(path))


def write_shelf(shelf: Shelf, file: Path) -> None:
    """Write json and, beside it, the picture as PNG."""
    picture = file.with_suffix(".png")
    F.to_pil_image(shelf.picture).save(picture)
    content = {
        "picture": picture.name,
        "rows": shelf.rows,
        "columns": shelf.columns,
        "target": shelf.target,
        "boxes": shelf.boxes.tolist(),
        "path": list(shelf.path),
    }
    file.write_text(json.dumps(content) + "\n", encoding="utf-8")


def even_boxes(rows: int, columns: int, height: int, width: int) -> Float[Tensor, "P 4"]:
    """Boxes (xyxy) of equal cells that fill a picture."""
    cells = grid_cells(rows, columns)[0].float()
    size = torch.tensor([height / rows, width / columns])
    corner = cells * size
    return torch.cat([corner.flip(1), (corner + size).flip(1)], 1)


def crops_of(shelf: Shelf, size: tuple[int, int]) -> Float[Tensor, "P 3 Y X"]:
    """The objects, each resized to (Y, X), in [0, 1]."""
    found = []
    for x0, y0, x1, y1 in shelf.boxes.round().int().tolist():
        crop = shelf.picture[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
        found.append(F.resize(crop, list(size), antialias=True))
    return torch.stack(found).float() / 255


class DigitShelves(Dataset[dict[str, Any]]):
    """One split of ``digit_shelves``.

    An item: ``crops`` (27, 3, 32, 24) float32 in [0, 1], ``target``, ``path`` (T,) int64, and for the measure of what
    can be known ``likeness`` (27,), which the program that searches sees of the objects.

    Args:
        split: ``"val"`` serves every choice, ``"test"`` the final number only.
        limit: use only the first shelves.

    Raises: ValueError for an unknown split, or without scikit-learn.
    """

    def __init__(self, split: Literal["train", "val", "test"] = "train", *, limit: int | None = None) -> None:
        if split not in SPLITS:
            raise ValueError(f"DigitShelves: split must be 'train', 'val' or 'test', got split={split!r}")
        self.split = split
        self.count = min(SPLITS[split][2], limit if limit is not None else SPLITS[split][2])
        self.metainfo: dict[str, Any] = {"rows": ROWS, "columns": COLUMNS, "crop_size": list(CROP)}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        cells, target, likeness, path = _digits(self.split, index)
        return {
            "crops": torch.from_numpy(cells).permute(0, 3, 1, 2).float() / 255,
            "target": target,
            "path": torch.tensor(path),
            "likeness": torch.from_numpy(likeness).float(),
        }

    def shelf(self, index: int) -> Shelf:
        """The picture of an item, with the path of the program that searched it."""
        cells, target, _, path = _digits(self.split, index)
        rows = cells.reshape(ROWS, COLUMNS, *CROP, 3)
        picture = torch.from_numpy(rows.transpose(0, 2, 1, 3, 4).reshape(ROWS * CROP[0], COLUMNS * CROP[1], 3).copy())
        boxes = even_boxes(ROWS, COLUMNS, *picture.shape[:2])
        return Shelf(picture.permute(2, 0, 1), ROWS, COLUMNS, boxes, target, path)


def collate_shelves(items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Items of `DigitShelves` → a batch; shorter paths are filled up with −1."""
    return {
        "crops": torch.stack([item["crops"] for item in items]),
        "target": torch.tensor([item["target"] for item in items]),
        "path": padded([item["path"].tolist() for item in items]),
        "likeness": torch.stack([item["likeness"] for item in items]),
    }


def next_object(likeness: Array, cells: Array, target: int, path: Sequence[int]) -> Array:
    """Chances of what the program looks at next: the P objects, and END.

    Behind the target it ends with probability 0.92, elsewhere with 0.015, at the start never. Else it stays with 0.08,
    or goes to another object j, d cells away, with chances exp(12·likeness_j·exp(−d/3) − d/0.4 − 4·[j was visited]):
    what is far off is seen less well. It starts in the middle.

    Args:
        likeness: of each object to the target, (P,). cells: row and column of each, (P, 2).
    """
    here = cells[path[-1]] if path else (cells.max(0) + cells.min(0)) / 2
    distance = np.sqrt(((cells - here) ** 2).sum(1))
    drawn = LIKENESS * likeness * np.exp(-distance / SIGHT) - distance / REACH
    drawn[list(set(path))] -= MEMORY
    chances = np.zeros(len(cells) + 1)
    if path:
        drawn[path[-1]] = -np.inf
        chances[-1] = FOUND if path[-1] == target else TIRED
    weights = np.exp(drawn - drawn.max())
    moving = (1 - chances[-1]) * ((1 - AGAIN) if path else 1)
    chances[:-1] = moving * weights / weights.sum()
    if path:
        chances[path[-1]] = (1 - chances[-1]) * AGAIN
    return chances


def search(draw: np.random.RandomState, likeness: Array, cells: Array, target: int) -> tuple[int, ...]:
    """A path of the program, of at most 20 fixations."""
    path: list[int] = []
    while len(path) < LONGEST:
        chances = next_object(likeness, cells, target, path)
        chosen = int(np.searchsorted(np.cumsum(chances), draw.random_sample() * chances.sum(), side="right"))
        if chosen >= len(cells):
            break
        path.append(chosen)
    return tuple(path)


@functools.lru_cache(maxsize=2048)
def _digits(split: str, index: int) -> tuple[NDArray[np.uint8], int, Array, tuple[int, ...]]:
    """Cells (27, 32, 24, 3), target, likeness, path."""
    low, high, _, first = SPLITS[split]
    draw = np.random.RandomState(first + index)
    count = ROWS * COLUMNS
    chosen = low + draw.permutation(high - low)[:count]
    target = int(draw.randint(count))
    glyphs, _ = _glyphs()
    flat = glyphs[chosen].reshape(count, -1) / 16
    flat = flat - flat.mean(1, keepdims=True)
    flat /= np.sqrt((flat**2).sum(1, keepdims=True))
    likeness = flat @ flat[target]
    paper, ink = draw.uniform(0.7, 1.0, (count, 1, 1, 3)), draw.uniform(0.0, 0.35, (count, 1, 1, 3))
    cells = np.broadcast_to(paper, (count, *CROP, 3)).copy()
    tops, lefts = draw.randint(0, CROP[0] - GLYPH + 1, count), draw.randint(0, CROP[1] - GLYPH + 1, count)
    for cell, own, glyph, top, left in zip(cells, ink, chosen, tops, lefts, strict=True):
        cover = _large(int(glyph))[..., None]
        region = cell[top : top + GLYPH, left : left + GLYPH]
        region[:] = region * (1 - cover) + own * cover
    path = search(draw, likeness, grid_cells(ROWS, COLUMNS)[0].double().numpy(), target)
    return np.floor(cells * 255 + 0.5).astype(np.uint8), target, likeness, path


@functools.cache
def _glyphs() -> tuple[np.ndarray, np.ndarray]:
    return load_glyphs()


@functools.lru_cache(maxsize=2048)
def _large(glyph: int) -> Array:
    return enlarged(_glyphs()[0][glyph] / 16.0, GLYPH)


def _count(file: Path, content: Mapping[str, Any], name: str, least: int, most: int) -> int:
    value = content.get(name)
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{file}: {name!r} must be an integer in {least}…{most}, got {_shown(value)}")
    return value


def _is_box(box: object) -> bool:
    numbers = isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) and math.isfinite(v) for v in box)
    return numbers and box[0] < box[2] and box[1] < box[3]  # pyright: ignore[reportIndexIssue]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:57]}..."
