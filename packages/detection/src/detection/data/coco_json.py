"""COCO json as exporters write it: every field looked at, repaired with one line, or refused with file and record.

Repaired: a byte order mark; ids as text; annotation ids that are missing, repeated or below 1 (pycocotools loses the
match of id 0); records that stand twice; files found under another folder, slash, case or Unicode form; boxes with
negative sides, over the border (cut off), without area (left out), as corners, as shares of the picture, or missing
beside an outline; areas and crowd flags that are null or no numbers; pictures that EXIF turns while the json has the
size as stored. Refused: what leaves a doubt about which box lies where, or which class it has.

Format: Lin et al., Microsoft COCO, ECCV 2014; https://cocodataset.org/#format-data. Checked in: ``data/test_coco.py``.
"""

import json
import math
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from PIL import Image, UnidentifiedImageError

HEADERS = 20_000  # so many pictures are compared with the json at the start; of larger sets each when it is loaded
SLACK = 2.0  # pixels over the border that say nothing about the form of a box
SPECKS = 0.01  # of the boxes may be smaller than a pixel and lie in the corner, among boxes in pixels
ROUNDING = 0.25  # pixels over the border that stay, for equal numbers with other tools
Turned = Literal["auto", "upright", "stored"]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class AnnotatedPicture:
    """A picture of a COCO json.

    Attributes:
        image_id: As in the json.
        path: Of the file.
        annotations: COCO records ``bbox`` (x, y, width, height), ``category_id``, ``area``, ``iscrowd``, in pixels of
            the upright picture.
        size: (width, height) that the upright picture must have; None if the json does not say.
    """

    image_id: int
    path: Path
    annotations: tuple[dict[str, Any], ...]
    size: tuple[int, int] | None = None


@dataclass
class Findings:
    """What is wrong with a file, one line each: refused, repaired, and remarks that change nothing."""

    refused: list[str] = field(default_factory=list)
    repaired: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


class CocoFile(NamedTuple):
    """Pictures, category id → name in the order of the ids, and what was found."""

    pictures: list[AnnotatedPicture]
    categories: dict[int, str]
    findings: Findings


class Header(NamedTuple):
    """Width and height as stored, and EXIF's orientation, 1 to 8."""

    width: int
    height: int
    orientation: int

    @property
    def turned(self) -> bool:
        """Whether rows and columns change places."""
        return self.orientation in (5, 6, 7, 8)

    @property
    def upright(self) -> tuple[int, int]:
        """(width, height) as people see the picture."""
        return (self.height, self.width) if self.turned else (self.width, self.height)


@dataclass(eq=False)
class _Image:
    key: int | str
    position: int
    name: str
    size: tuple[float, float] | None  # of the json
    path: Path | None = None
    header: Header | None = None
    records: "list[_Record]" = field(default_factory=list)

    @property
    def said(self) -> str:
        return f"image {self.position} (id={self.key!r}, {_short(self.name)})"


@dataclass
class _Record:
    position: int
    category: int
    box: Box | None
    area: float | None
    crowd: int
    outline: Box | None  # x, y, width, height of the segmentation
    given: Any = None

    @property
    def said(self) -> str:
        return f"annotation {self.position}"


def read_header(path: Path) -> Header:
    """Size of a picture without decoding it.

    Raises: ValueError that names the file.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            try:
                orientation = image.getexif().get(274, 1)
            except Exception:  # damaged EXIF raises whatever its parser stumbles over; viewers ignore it, too
                orientation = 1
            return Header(width, height, orientation if orientation in range(1, 9) else 1)
    except UnidentifiedImageError:
        raise ValueError(f"{path}: not an image, or of an unknown format") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def load_json(path: Path) -> Any:
    """What a json file holds, in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    Raises: ValueError that names the file.
    """
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a json file: {error}") from None


def read_coco(path: Path, folder: Path, *, turned: Turned = "auto", headers: int = HEADERS) -> CocoFile:
    """Pictures with their annotations, and category id → name.

    Args:
        path: The json. folder: Of its pictures.
        turned: how boxes of pictures that EXIF turns are meant where the json has the size as stored: in the
            ``"upright"`` picture, in the ``"stored"`` one, or ``"auto"``: as stored, unless boxes fit upright only.
        headers: more pictures than this are not opened.

    Raises: ValueError naming the file and the first offending record, and how many more there are.
    """
    found = inspect_coco(path, folder, turned=turned, headers=headers)
    if refused := found.findings.refused:
        more = f"; and {len(refused) - 1} more, see 'detection check'" if len(refused) > 1 else ""
        raise ValueError(f"{path}: {refused[0]}{more}")
    return found


def inspect_coco(path: Path, folder: Path, *, turned: Turned = "auto", headers: int = HEADERS) -> CocoFile:
    """As `read_coco`, with what is refused in the findings.

    Raises: ValueError if the file is no COCO json at all.
    """
    if turned not in ("auto", "upright", "stored"):
        raise ValueError(f"CocoDetection: turned must be 'auto', 'upright' or 'stored', got turned={turned!r}")
    content = load_json(path)
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise ValueError(f"{path}: not a COCO file, it has no list {key!r}")
    findings = Findings()
    names = read_categories(content["categories"], findings)
    images = _read_images(content["images"], folder, findings)
    if len(images) <= headers:
        _read_headers(images.values(), findings)
    _read_records(content["annotations"], images, names, findings)
    everything = [(image, record) for image in images.values() for record in image.records]
    _settle_form(everything, findings)
    _settle_size(images.values(), turned, findings)
    pictures = _finish(images.values(), findings)
    if not any(record["iscrowd"] == 0 for picture in pictures for record in picture.annotations):
        findings.remarks.append("no picture has an object")
    present = {record.category for _, record in everything}
    without = [name for key, name in names.items() if key not in present]
    if without:
        findings.remarks.append(f"{len(without)} of {len(names)} categories have no object: {_some(without)}")
    empty = sum(not picture.annotations for picture in pictures)
    if empty:
        findings.remarks.append(f"{empty} of {len(pictures)} pictures have no object")
    return CocoFile(pictures, names, findings)


def read_categories(entries: Sequence[Any], findings: Findings) -> dict[int, str]:
    """Category id → name in the order of the ids."""
    if not entries:
        findings.refused.append("the list of categories is empty, there is nothing to detect")
    names: dict[int, str] = {}
    textual = twice = 0
    for position, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            findings.refused.append(f"category {position} is {_short(entry)}, not a record")
            continue
        key, name = _integer(entry.get("id")), entry.get("name")
        if isinstance(name, int | float) and not isinstance(name, bool):
            name = str(name)
        if key is None or not isinstance(name, str) or not name.strip():
            findings.refused.append(
                f"category {position} lacks id or name: id={_short(entry.get('id'))}, name={_short(name)}"
            )
            continue
        textual += not _is_integer(entry["id"])
        name = name.strip()
        if key in names and names[key] != name:
            findings.refused.append(f"category id={key} is both {_short(names[key])} and {_short(name)}")
        twice += key in names
        names.setdefault(key, name)
    _note(findings.repaired, textual, "category ids are no whole numbers and were read as such")
    _note(findings.repaired, twice, "categories stand twice and count once")
    for name, count in Counter(names.values()).items():
        if count > 1:
            ids = [key for key, own in names.items() if own == name]
            findings.remarks.append(f"{count} categories have the name {_short(name)}, ids {ids}")
    return dict(sorted(names.items()))


def _read_images(entries: Sequence[Any], folder: Path, findings: Findings) -> dict[int | str, _Image]:
    if not entries:
        findings.refused.append("the list of images is empty")
    images: dict[int | str, _Image] = {}
    textual = twice = 0
    for position, entry in enumerate(entries):
        if not isinstance(entry, Mapping):
            findings.refused.append(f"image {position} is {_short(entry)}, not a record")
            continue
        key, name = _key(entry.get("id")), entry.get("file_name")
        if key is None or not isinstance(name, str) or not name.strip():
            findings.refused.append(
                f"image {position} lacks id or file_name: id={_short(entry.get('id'))}, file_name={_short(name)}"
            )
            continue
        textual += not _is_integer(entry["id"])
        width, height = _number(entry.get("width")), _number(entry.get("height"))
        known = width is not None and height is not None and 1 <= width < math.inf and 1 <= height < math.inf
        image = _Image(key, position, name, (width, height) if known else None)  # pyright: ignore[reportArgumentType]
        if key in images:
            if images[key].name != name:
                findings.refused.append(f"image id={key!r} appears twice: {_short(images[key].name)}, {_short(name)}")
            twice += 1
            continue
        images[key] = image
    _note(findings.repaired, textual, "image ids are no whole numbers and were read as such")
    _note(findings.repaired, twice, "images stand twice and count once")
    _find_files(images.values(), folder, findings)
    return images


def _find_files(images: Iterable[_Image], folder: Path, findings: Findings) -> None:
    images = list(images)
    listing: dict[str, list[Path]] | None = None
    elsewhere = 0
    owner: dict[Path, _Image] = {}
    missing = []
    for image in images:
        image.path = _is_file(folder / image.name)
        if image.path is None:
            if listing is None:
                listing = _listing(folder)
            image.path = _search(image.name, folder, listing)
            elsewhere += image.path is not None
        if image.path is None:
            missing.append(image.name)
        elif owner.setdefault(image.path, image) is not image:
            first = owner[image.path]
            findings.refused.append(f"{_short(image.name)} is the picture of two ids, {first.key!r} and {image.key!r}")
    _note(findings.repaired, elsewhere, "files were found under another folder, slash, case or Unicode form")
    if missing:
        findings.refused.append(
            f"{len(missing)} of {len(images)} image files are missing in {folder}: {_some(missing)}"
        )


def _search(name: str, folder: Path, listing: Mapping[str, Sequence[Path]]) -> Path | None:
    plain = name.replace("\\", "/").strip()
    last = plain.rsplit("/", 1)[-1]
    for candidate in (folder / plain, folder.parent / plain, folder / last):
        if found := _is_file(candidate):
            return found
    alike = listing.get(_folded(last), ())
    return alike[0] if len(alike) == 1 else None


def _listing(folder: Path) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = defaultdict(list)
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        found[_folded(path.name)].append(path)
    return found


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _is_file(path: Path) -> Path | None:
    try:
        return path if path.is_file() else None
    except (OSError, ValueError):  # a name that no file can have
        return None


def _read_headers(images: Iterable[_Image], findings: Findings) -> None:
    for image in images:
        if image.path is None:
            continue
        try:
            image.header = read_header(image.path)
        except ValueError as error:
            findings.refused.append(f"{image.said}: {error}")


def _read_records(
    entries: Sequence[Any], images: Mapping[int | str, _Image], names: Mapping[int, str], findings: Findings
) -> None:
    ids, textual, areas, crowds, outlined = [], 0, 0, 0, 0
    for position, entry in enumerate(entries):
        said = f"annotation {position}"
        if not isinstance(entry, Mapping):
            findings.refused.append(f"{said} is {_short(entry)}, not a record")
            continue
        image, category = _key(entry.get("image_id")), _integer(entry.get("category_id"))
        if image is None or category is None:
            own = {key: entry.get(key) for key in ("image_id", "category_id")}
            findings.refused.append(f"{said} lacks image_id or category_id: {_short(own)}")
            continue
        if image not in images:
            findings.refused.append(f"{said} belongs to image_id={image!r}, which is not in the list of images")
            continue
        if category not in names:
            findings.refused.append(f"{said} has category_id={category}, which is not in the list of categories")
            continue
        outline = _outline(entry.get("segmentation"))
        box = _box(entry.get("bbox"))
        if box is None and entry.get("bbox") in (None, []) and outline is not None:
            box = outline
            outlined += 1
        if box is None:
            findings.refused.append(f"{said} has the box {_short(entry.get('bbox'))}; it must be four finite numbers")
            continue
        crowd = _crowd(entry.get("iscrowd"))
        if crowd is None:
            findings.refused.append(f"{said} has iscrowd={_short(entry.get('iscrowd'))}; it must be 0 or 1")
            continue
        area = _number(entry.get("area"))
        usable = area is not None and 0 <= area < math.inf
        areas += "area" in entry and not usable
        crowds += "iscrowd" in entry and entry["iscrowd"] is None
        said_as_text = [*(entry.get("bbox") or ()), entry["category_id"], entry["image_id"]]
        textual += any(isinstance(value, str) for value in said_as_text) and isinstance(image, int)
        ids.append(_integer(entry.get("id")))
        record = _Record(position, category, box, area if usable else None, crowd, outline, entry.get("bbox"))
        images[image].records.append(record)
    if any(key is None or key < 1 for key in ids) or len({*ids}) < len(ids):
        findings.repaired.append("annotation ids were missing, repeated or below 1 and were numbered anew")
    _note(findings.repaired, textual, "annotations hold numbers as text")
    _note(findings.repaired, outlined, "annotations have no box; it was taken from their outlines")
    _note(findings.repaired, areas, "areas are null or no numbers and were computed from the boxes")
    _note(findings.repaired, crowds, "values of iscrowd are null and count as 0")


def _settle_form(pairs: Sequence[tuple[_Image, _Record]], findings: Findings) -> None:
    """Shares of the picture and corners become x, y, width, height in pixels, if the whole file speaks for them."""
    flipped = 0
    boxes = [record.box for _, record in pairs if record.box is not None]
    small = [record for _, record in pairs if record.box is not None and _looks_like_shares(record.box)]
    shares = bool(small) and all(max(map(abs, box)) <= 1 for box in boxes)
    if not shares and len(small) > SPECKS * len(boxes):
        record = small[0]
        findings.refused.append(
            f"{record.said} has the box {_short(record.given)}, which looks like shares of the picture, while others "
            "are in pixels"
        )
    if shares:
        centers = [box for box in boxes if box[0] + box[2] > 1.001 or box[1] + box[3] > 1.001]
        if centers:
            findings.refused.append(
                f"boxes are shares of the picture, but not x, y, width, height: {_short(list(centers[0]))}; centers "
                "(as YOLO has them) and corners must be converted"
            )
        for image, record in pairs:
            width, height = _frame(image)
            if not math.isfinite(width):
                findings.refused.append(f"{image.said} has no width and height, and its boxes are shares of them")
                return
            if record.box is not None:
                x, y, w, h = record.box
                record.box, record.area = (x * width, y * height, w * width, h * height), None
        findings.repaired.append(f"{len(boxes)} boxes are shares of the picture and were multiplied by its size")
    elif _are_corners(pairs):
        for _, record in pairs:
            if record.box is not None:
                x0, y0, x1, y1 = record.box
                record.box = (x0, y0, x1 - x0, y1 - y0)
        findings.repaired.append(f"{len(boxes)} boxes are corners (x0, y0, x1, y1) and became x, y, width, height")
    for _, record in pairs:
        if record.box is not None and min(record.box[2:]) < 0:
            x, y, w, h = record.box
            record.box = (min(x, x + w), min(y, y + h), abs(w), abs(h))
            flipped += 1
    _note(findings.repaired, flipped, "boxes had negative sides and were turned over")


def _looks_like_shares(box: Box) -> bool:
    return max(map(abs, box)) <= 1 and any(value % 1 for value in box)


def _are_corners(pairs: Sequence[tuple[_Image, _Record]]) -> bool:
    """Whether every box can be corners and something (border, area, outline) speaks against width and height."""
    evidence = False
    for image, record in pairs:
        if record.box is None:
            continue
        a, b, c, d = record.box
        sides = [_frame(image)] if image.header is None else [_frame(image), image.header.upright]
        width, height = max(side[0] for side in sides), max(side[1] for side in sides)
        if not (c > a and d > b and a >= -SLACK and b >= -SLACK and c <= width + SLACK and d <= height + SLACK):
            return False
        by_size = record.area is not None and math.isclose(record.area, c * d, rel_tol=0.01)
        by_corners = record.area is not None and math.isclose(record.area, (c - a) * (d - b), rel_tol=0.01)
        if record.outline is not None:
            x, y, w, h = record.outline
            near = max(SLACK, 0.02 * max(w, h))
            by_size |= abs(w - c) <= near and abs(h - d) <= near
            by_corners |= abs(x + w - c) <= near and abs(y + h - d) <= near and abs(x - a) <= near
        if by_size and not by_corners:
            return False
        beyond = a + c > width + max(SLACK, 0.1 * c) or b + d > height + max(SLACK, 0.1 * d)
        evidence |= beyond or (by_corners and not by_size)
    return evidence


def _frame(image: _Image) -> tuple[float, float]:
    """(width, height) of the picture that boxes are meant in: the json's, or the file's where it says nothing."""
    if image.size is not None:
        return image.size
    return image.header.upright if image.header is not None else (math.inf, math.inf)


def _settle_size(images: Iterable[_Image], turned: Turned, findings: Findings) -> None:
    """Compare the json with the files; boxes end in pixels of the upright picture."""
    unknown = exchanged = 0
    by_exif: list[_Image] = []
    for image in images:
        header = image.header
        if header is None:
            continue
        if image.size is None:
            unknown += 1
            image.size = header.upright
        if header.orientation > 1 and (
            _equal(image.size, header.upright) or _equal(image.size, (header.width, header.height))
        ):
            by_exif.append(image)
        elif _equal(image.size[::-1], header.upright) and _fit(image, header.upright):
            exchanged += not _equal(image.size, header.upright)
            image.size = header.upright
        elif not _equal(image.size, header.upright):
            (w, h), (width, height) = image.size, header.upright
            findings.refused.append(
                f"{image.said} is {w:g}×{h:g} in the json, its file is {width}×{height}; correct one of them"
            )
    _note(findings.repaired, unknown, "images have no width and height in the json; those of the files were taken")
    _note(findings.repaired, exchanged, "images have width and height exchanged in the json")
    _settle_turned(by_exif, turned, findings)


def _settle_turned(images: Sequence[_Image], turned: Turned, findings: Findings) -> None:
    """Boxes of pictures that EXIF turns are meant in the frame whose size the json has, unless they fit the other only.

    A file has one exporter, so all pictures with their size as stored are read alike.
    """
    as_stored: list[_Image] = []
    as_upright: list[_Image] = []
    elsewhere: set[_Image] = set()
    inside: set[_Image] = set()
    for image in images:
        assert image.header is not None
        assert image.size is not None
        stored, upright = (image.header.width, image.header.height), image.header.upright
        (as_stored if _equal(image.size, stored) and not _equal(image.size, upright) else as_upright).append(image)
        other = upright if as_stored and as_stored[-1] is image else stored
        if not _fit(image, image.size) and _fit(image, other):
            elsewhere.add(image)
        elif not _fit(image, other):
            inside.add(image)
    way_out = "say which holds with --set turned=upright or --set turned=stored"
    if turned == "auto" and (wrong := [image for image in as_upright if image in elsewhere]):
        findings.refused.append(
            f"EXIF turns {wrong[0].said}: its boxes fit the picture as stored only, its size is the upright one's; "
            f"{way_out}"
        )
    beyond, within = [i for i in as_stored if i in elsewhere], [i for i in as_stored if i in inside]
    if turned == "auto" and beyond and within:
        findings.refused.append(
            f"EXIF turns pictures; boxes of {beyond[0].said} fit the upright one only, those of {within[0].said} the "
            f"stored one only; {way_out}"
        )
    moved = [*images] if turned == "stored" else as_stored if turned == "auto" and not beyond else []
    for image in images:
        assert image.header is not None
        image.size = image.header.upright
    for image in moved:
        assert image.header is not None
        for record in image.records:
            record.box = record.box and _turn(record.box, image.header)
    kept = len(as_stored) if not moved else 0
    _note(findings.repaired, len(moved), "pictures are turned by EXIF; their boxes were turned with them")
    _note(findings.repaired, kept, "pictures are turned by EXIF and have their size as stored; boxes are meant upright")
    _note(findings.remarks, len(images), "pictures are shown upright, as their EXIF says")


def _turn(box: Box, header: Header) -> Box:
    """A box of the stored picture in the upright one."""
    x, y, w, h = box
    width, height = header.upright
    if header.turned:
        x, y, w, h = y, x, h, w
    if header.orientation in (3, 4, 7, 8):
        y = height - y - h
    if header.orientation in (2, 3, 6, 7):
        x = width - x - w
    return x, y, w, h


def _fit(image: _Image, size: tuple[float, float]) -> bool:
    boxes = [record.box for record in image.records if record.box is not None]
    return all(x + w <= size[0] + SLACK and y + h <= size[1] + SLACK for x, y, w, h in boxes)


def _equal(a: Sequence[float], b: Sequence[float]) -> bool:
    return round(a[0]) == round(b[0]) and round(a[1]) == round(b[1])


def _finish(images: Iterable[_Image], findings: Findings) -> list[AnnotatedPicture]:
    """Boxes cut at the border; what has no area, or stands twice, left out."""
    images = list(images)
    cut = empty = twice = 0
    numbered = any(isinstance(image.key, str) for image in images)
    pictures = []
    for number, image in enumerate(images, 1):
        width, height = image.size or (math.inf, math.inf)
        kept: dict[tuple[int, int, Box], dict[str, Any]] = {}
        for record in image.records:
            if record.box is None:
                continue
            x, y, w, h = record.box
            x0, y0, x1, y1 = max(x, 0.0), max(y, 0.0), min(x + w, width), min(y + h, height)
            if x1 <= x0 or y1 <= y0:
                empty += 1
                continue
            if max(x0 - x, y0 - y, x + w - x1, y + h - y1) > ROUNDING:
                cut += 1
                x, y, w, h = x0, y0, x1 - x0, y1 - y0
            key = (record.category, record.crowd, (x, y, w, h))
            twice += key in kept
            kept.setdefault(
                key,
                {
                    "bbox": [x, y, w, h],
                    "category_id": record.category,
                    "area": w * h if record.area is None else record.area,
                    "iscrowd": record.crowd,
                },
            )
        size = None if image.size is None else (round(image.size[0]), round(image.size[1]))
        key = number if numbered else image.key
        assert isinstance(key, int)
        pictures.append(AnnotatedPicture(key, image.path or Path(image.name), tuple(kept.values()), size))
    if numbered:
        findings.repaired.append("image ids are text; pictures were numbered from 1")
    _note(findings.repaired, cut, "boxes reached over the border and were cut off")
    _note(findings.repaired, empty, "boxes without area inside the image were left out")
    _note(findings.repaired, twice, "boxes stand twice (same picture, category and corners) and count once")
    return pictures


def _note(lines: list[str], count: int, text: str) -> None:
    if count:
        lines.append(f"{count} {text}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(value: Any) -> int | None:
    """A whole number of 64 bits, which may be a float or text."""
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            value = _number(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return int(value) if value is not None and _is_integer(value) and abs(value) < 2**63 else None


def _number(value: Any) -> float | None:
    """A number, which may be text; NaN and infinity are none."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _key(value: Any) -> int | str | None:
    """The id of a picture: a whole number, or text."""
    whole = _integer(value)
    if whole is not None:
        return whole
    return value if isinstance(value, str) and value.strip() else None


def _box(value: Any) -> Box | None:
    if not isinstance(value, list) or len(value) != 4:
        return None
    numbers = [_number(item) for item in value]
    return None if any(number is None or abs(number) > 1e9 for number in numbers) else tuple(numbers)  # type: ignore[return-value]


def _crowd(value: Any) -> int | None:
    """0 or 1; None if it is neither."""
    number = int(bool(value)) if value is None or isinstance(value, bool) else _integer(value)
    return number if number in (0, 1) else None


def _outline(value: Any) -> Box | None:
    """The rectangle around a segmentation of polygons."""
    if not isinstance(value, list):
        return None
    polygons = [part for part in value if isinstance(part, list)] or [value]
    numbers = [_number(item) for part in polygons for item in part]
    if len(numbers) < 6 or any(number is None for number in numbers) or any(len(part) % 2 for part in polygons):
        return None
    x, y = [number for number in numbers[0::2] if number is not None], [n for n in numbers[1::2] if n is not None]
    return min(x), min(y), max(x) - min(x), max(y) - min(y)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _some(names: Sequence[str]) -> str:
    return ", ".join(_short(name) for name in names[:3]) + (", …" if len(names) > 3 else "")
