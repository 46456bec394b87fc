"""The one picture reader of all packages: a file's levels as they are stored, upright, or one line that refuses it.

Pillow decodes. Where it would drop low bytes without a word (color of 16 bits, floats in color, 64 bits) tifffile or
OpenCV decodes, if it is installed; otherwise the file is refused. Nothing here is imported by ``import attn_core``.
"""

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Integer, Shaped, UInt8

ENDINGS = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".ppm", ".pgm")
"""Of files that count as pictures when a folder is searched; compare them in lower case, as `is_picture` does."""

CHANNELS = {1: ("grey",), 2: ("grey", "alpha"), 3: ("red", "green", "blue"), 4: ("red", "green", "blue", "alpha")}
WHOLE = 1e-3  # how far a class number stored as a float may lie from an integer
_COARSE_GREY = {"L;2": 85, "L;4": 17}  # Pillow spreads grey of 2 and 4 bits over 0 to 255
_EIGHT_BIT = ("L", "LA", "RGB", "RGBA", "RGBX", "CMYK")

Levels = Shaped[np.ndarray, "Y X C"]
Limits = tuple[float, float]


@dataclass(frozen=True)
class Picture:
    """A decoded file.

    Attributes:
        levels: (Y, X, C) in the dtype of the file and the machine's byte order, turned upright as its EXIF says.
            Palettes, CMYK and the like are RGB; of 1 bit black is 0 and white 255.
        path: Of the file.
    """

    levels: Levels
    path: Path

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the last axis: grey, or red green blue, each with or without alpha."""
        return CHANNELS[self.levels.shape[2]]

    def rgb(self, *, limits: Limits | None = None) -> UInt8[np.ndarray, "Y X 3"]:
        """8-bit colors: `to_eight_bits`, transparent parts laid on white, grey three times.

        Raises: ValueError for levels that have no black and white of their own, naming the file.
        """
        opaque = self._opaque(limits)
        return np.repeat(opaque, 3, axis=2) if opaque.shape[2] == 1 else opaque

    def grey(self, *, limits: Limits | None = None) -> UInt8[np.ndarray, "Y X"]:
        """8-bit grey: `to_eight_bits`, transparent parts laid on white, colors weighted as in ITU-R 601.

        Raises: ValueError for levels that have no black and white of their own, naming the file.
        """
        opaque = self._opaque(limits)
        if opaque.shape[2] == 1:
            return opaque[..., 0]
        return ((opaque @ np.array([19595, 38470, 7471], np.uint32) + 0x8000) >> 16).astype(np.uint8)

    def _opaque(self, limits: Limits | None) -> UInt8[np.ndarray, "Y X C"]:
        try:
            color, alpha = _split_alpha(self.levels)
            shown = to_eight_bits(color, limits=limits)
            if alpha is None:
                return shown
            share = to_eight_bits(alpha).astype(np.uint32)
        except ValueError as error:
            raise ValueError(f"{self.path}: {error}") from None
        return ((shown * share + 255 * (255 - share) + 127) // 255).astype(np.uint8)


def to_eight_bits(levels: Shaped[np.ndarray, "*shape"], *, limits: Limits | None = None) -> UInt8[np.ndarray, "*shape"]:
    """Levels as 0 to 255, by a rule that depends on the dtype alone, never on what else is in the picture.

    uint8 stays. uint16 is divided by 257 and rounded. Floats must lie in [0, 1] and are multiplied by 255. Every other
    dtype has no level that means white: it needs ``limits``.

    Args:
        limits: levels that become black and white; what lies beyond is clipped. None for the rule of the dtype.

    Raises: ValueError if the rule does not cover the levels, with the way out.
    """
    if limits is not None:
        low, high = map(float, limits)
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"to_eight_bits: limits must be two finite numbers, the smaller first, got {limits}")
        return np.round((levels.astype(np.float64).clip(low, high) - low) * (255 / (high - low))).astype(np.uint8)
    if levels.dtype == np.uint8:
        return levels
    if levels.dtype == np.uint16:
        return ((levels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    way_out = "save it with 8 or 16 bits, or give limits=(black, white)"
    lowest, highest = (levels.min(), levels.max()) if levels.size else (0, 0)
    if levels.dtype.kind != "f":
        raise ValueError(f"levels {lowest} to {highest} of type {levels.dtype} say not which is white; {way_out}")
    if not (lowest >= 0 and highest <= 1):
        raise ValueError(f"levels of type {levels.dtype} must lie in [0, 1], got {lowest:g} to {highest:g}; {way_out}")
    return np.round(levels * 255).astype(np.uint8)


def is_picture(path: Path) -> bool:
    """Whether a file's name ends like a picture's, in upper or lower case; hidden files do not count."""
    return path.suffix.lower() in ENDINGS and not path.name.startswith(".")


def read_picture(path: str | Path) -> Picture:
    """Decode a picture without losing a level. Of an animation the first frame is taken.

    Raises: ValueError, one line that names the file: missing, a folder, empty, no picture, damaged, NaN or infinity,
        several pages, a kind whose levels no installed library keeps.
    """
    path = Path(path)
    levels = _decode(path, indices=False).levels
    if levels.dtype.kind == "f" and not np.isfinite(levels).all():
        raise ValueError(f"{path}: {int((~np.isfinite(levels)).sum()):,} levels are NaN or infinite")
    return Picture(levels, path)


def read_mask(path: str | Path) -> Integer[np.ndarray, "Y X"]:
    """Class numbers of a mask, upright: grey levels, indices of a palette, or 0 and 1 of a file of 1 bit.

    Floats within 0.001 of integers count as these. Grey that was saved as RGB or with opaque alpha is read as grey.

    Raises: ValueError, one line that names the file: what `read_picture` refuses, colors, transparency, JPEG (which
        changes class numbers), fractions, grey that is stored inverted.
    """
    path = Path(path)
    levels, kind = _decode(path, indices=True)
    if kind == "JPEG":
        raise ValueError(f"{path}: JPEG changes class numbers; save masks as PNG")
    if kind == "inverted":
        raise ValueError(f"{path}: grey is stored inverted (WhiteIsZero), its class numbers are uncertain; save a PNG")
    color, alpha = _split_alpha(levels)
    if alpha is not None and (alpha != alpha.flat[0]).any():
        raise ValueError(f"{path}: parts are transparent; masks hold class numbers, save grey or a palette")
    if (color != color[..., :1]).any():
        raise ValueError(f"{path}: a mask in colors; masks hold class numbers, save grey or a palette")
    return whole_numbers(color[..., 0], str(path))


def whole_numbers(values: Shaped[np.ndarray, "*shape"], name: str) -> Integer[np.ndarray, "*shape"]:
    """Class numbers that may be stored as floats, such as 0.99999994, as integers.

    Args:
        name: of the file, for the message.

    Raises: ValueError for NaN, infinity, or a value further than 0.001 from an integer.
    """
    if values.dtype.kind in "iu":
        return values
    if values.dtype.kind == "b":
        return values.astype(np.uint8)
    if not np.isfinite(values).all():
        raise ValueError(f"{name}: labels hold NaN or infinity")
    rounded = np.round(values)
    wrong = np.abs(values - rounded) > WHOLE
    if wrong.any():
        raise ValueError(f"{name}: labels are not integers, found {values[wrong].flat[0]:g}")
    if rounded.size and np.abs(rounded).max() > 2**31:
        raise ValueError(f"{name}: {rounded.flat[np.abs(rounded).argmax()]:g} is no class number")
    return rounded.astype(np.int64)


class _Decoded(NamedTuple):
    levels: Levels
    kind: Literal["JPEG", "inverted", "other"] = "other"


class _Refusal(Exception):
    """Why a picture is refused, without its name."""


def _decode(path: Path, *, indices: bool) -> _Decoded:
    """Levels, upright; of palettes the indices if asked for."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise ValueError(f"{path}: pictures need Pillow; pip install 'attn-core[pictures]'") from None
    try:
        _check_file(path)
        with warnings.catch_warnings():
            # What Pillow merely warns of (odd EXIF, big pictures) does not change the levels.
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return _levels_of(image, path, indices=indices)
    except UnidentifiedImageError:
        pass
    except _Refusal as refusal:
        raise ValueError(f"{path}: {refusal}") from None
    except MemoryError:
        raise ValueError(f"{path}: the picture does not fit into memory") from None
    except Exception as error:
        # Decoders of a damaged file raise whatever they stumble over: zlib.error, struct.error, KeyError, SyntaxError …
        raise ValueError(f"{path}: the picture is damaged: {_one_line(error)}") from None
    try:
        if not _is_tiff(path):
            raise _Refusal("not a picture, or of an unknown format")
        return _Decoded(_upright(*_by_tifffile(path, indices=indices)))  # of a sample format that Pillow does not know
    except _Refusal as refusal:
        raise ValueError(f"{path}: {refusal}") from None


def _check_file(path: Path) -> None:
    try:
        size = path.stat().st_size
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise _Refusal(getattr(error, "strerror", None) or error) from None
    if path.is_dir():
        raise _Refusal("is a folder, not a picture")
    if not path.is_file():
        raise _Refusal("is not a regular file")
    if size == 0:
        raise _Refusal("the file is empty (0 bytes)")


def _levels_of(image: Any, path: Path, *, indices: bool) -> _Decoded:
    packing, form, bits, sample = _packing(image), image.format, 8, 1
    if form == "TIFF":
        _one_page(image)
        bits, sample = _tiff_samples(image)
        if (bits > 8 and image.mode in _EIGHT_BIT) or _misplaced(image):
            return _Decoded(_upright(*_by_tifffile(path, indices=indices)))
    elif ("16" in packing or _maximum(image) > 255) and image.mode in _EIGHT_BIT:
        return _Decoded(_upright(_by_opencv(path), _orientation(image)))
    image.load()  # before anything else: a truncated file must fail here
    kind = "JPEG" if form in ("JPEG", "MPO") else "other"
    if indices and image.mode in ("P", "PA"):
        array = np.asarray(image)
        array = array[..., :1] if array.ndim == 3 else array
    elif image.mode == "1":
        array = np.asarray(image).astype(np.uint8) * np.uint8(1 if indices else 255)
    else:
        array = np.asarray(_plain_mode(image))
        if array.dtype.kind == "i" and form in ("PNG", "PPM"):  # Pillow's int32 for what has 16 bits
            array = array.astype(np.uint16)
        if form == "TIFF":
            array = _as_stored(array, bits, sample)
        if indices and image.mode == "L" and packing.endswith("I"):
            kind = "inverted"
        elif indices and packing in _COARSE_GREY:
            array = array // np.uint8(_COARSE_GREY[packing])
    return _Decoded(_upright(_native(array), _orientation(image)), kind)


def _native(array: np.ndarray) -> Levels:
    """(Y, X, C) in the machine's byte order."""
    array = array[..., None] if array.ndim == 2 else array
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _packing(image: Any) -> str:
    """How the first tile is packed in the file, such as ``"RGB;16B"``; known before decoding only."""
    arguments = image.tile[0][3] if image.tile else ""
    if isinstance(arguments, tuple | list):
        arguments = next((text for text in arguments if isinstance(text, str)), "")
    return str(arguments)


def _maximum(image: Any) -> int:
    """The white of a PPM file."""
    if image.format != "PPM" or not image.tile or not isinstance(image.tile[0][3], tuple):
        return 255
    return max((number for number in image.tile[0][3] if isinstance(number, int)), default=255)


def _one_page(image: Any) -> None:
    pages = 0
    for index in range(getattr(image, "n_frames", 1)):
        image.seek(index)
        pages += not image.tag_v2.get(254, 0) & 1  # small copies of another page do not count
    image.seek(0)
    if pages > 1:
        raise _Refusal(f"holds {pages} pages; write one picture per file, or a volume")


def _tiff_samples(image: Any) -> tuple[int, int]:
    """Bits of a sample, and its format: 1 unsigned, 2 signed, 3 float."""
    bits, sample = image.tag_v2.get(258, (1,)), image.tag_v2.get(339, (1,))
    return max(bits) if isinstance(bits, tuple) else int(bits), sample[0] if isinstance(sample, tuple) else int(sample)


def _misplaced(image: Any) -> bool:
    """Whether Pillow (13.0) would put samples in wrong places without a word, or fail."""
    turned = image.tag_v2.get(274, 1) in (5, 6, 7, 8) and bool(image.tile) and image.tile[0][0] == "raw"
    return turned or (image.mode == "LA" and image.tag_v2.get(284, 1) == 2)


def _as_stored(array: np.ndarray, bits: int, sample: int) -> np.ndarray:
    """Pillow calls all integers of 32 bits and all signed ones int32, and those of 8 bits unsigned."""
    if sample == 2 and bits == 8:
        return array.view(np.int8)
    if sample == 2 and bits == 16:
        return array.astype(np.int16)
    if sample == 1 and array.dtype == np.int32:
        return array.view(np.uint32) if bits == 32 else array.astype(np.uint16)
    return array


def _plain_mode(image: Any) -> Any:
    """The picture in a mode whose array is grey or RGB, with alpha where something may be transparent."""
    mode = image.mode
    if mode.startswith("I;16") or mode in ("I", "F", "LA", "RGBA"):
        return image
    if mode in ("La", "PA", "RGBa") or "transparency" in image.info:
        return image.convert("LA" if mode in ("L", "La") else "RGBA")
    return image if mode in ("L", "RGB") else image.convert("RGB")


def _orientation(image: Any) -> int:
    """EXIF's number, 1 to 8; damaged EXIF counts as none, as in viewers."""
    try:
        number = image.getexif().get(274, 1)
    except (
        Exception
    ):  # whatever Pillow's parser stumbles over (struct, syntax, type and OS errors): the picture is read
        return 1
    return number if number in range(1, 9) else 1


def _upright(levels: Levels, orientation: int) -> Levels:
    """Undo the turn that EXIF tells of: 2 to 4 flip, 5 to 8 also exchange rows and columns."""
    if orientation in (5, 6, 7, 8):
        levels = levels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        levels = levels[::-1]
    if orientation in (2, 3, 6, 7):
        levels = levels[:, ::-1]
    return np.ascontiguousarray(levels)


def _is_tiff(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@contextmanager
def _decoding(library: str, install: str) -> Iterator[None]:
    """One line about what a second library could not do."""
    try:
        yield
    except _Refusal:
        raise
    except ImportError:
        raise _Refusal(f"Pillow would drop levels of this kind; pip install {install}, which keeps them") from None
    except Exception as error:
        raise _Refusal(f"{library} cannot read it: {_one_line(error)}") from None


def _by_tifffile(path: Path, *, indices: bool) -> tuple[Levels, int]:
    """Levels and orientation of a TIFF of any sample format."""
    with _decoding("tifffile", "tifffile"):
        import tifffile

        logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # it also logs what it raises
        with tifffile.TiffFile(path) as file:
            found: Any = file.pages
            pages = [page for page in found if not page.is_reduced]
            if len(pages) != 1:
                raise _Refusal(f"holds {len(pages)} pages; write one picture per file, or a volume")
            page: Any = pages[0]
            array = np.asarray(page.asarray())
            if int(page.photometric) not in ((1, 2, 3) if indices else (1, 2)):  # grey, RGB, palette
                raise _Refusal(f"no library here reads levels of {array.dtype} with photometric {page.photometric}")
            tag = page.tags.get(274)
        if array.ndim == 3 and int(page.planarconfig) == 2:
            array = np.moveaxis(array, 0, 2)
        array = _native(array)
        if array.ndim != 3 or array.shape[2] not in CHANNELS or array.dtype.kind not in "iuf":
            raise _Refusal(f"an array of {array.dtype} and shape {array.shape} is no picture")
        number = int(tag.value) if tag is not None else 1
    return array, number if number in range(1, 9) else 1


def _by_opencv(path: Path) -> Levels:
    """Levels of color with 16 bits, as stored."""
    with _decoding("OpenCV", "opencv-python-headless"):
        import cv2

        decoded = cv2.imdecode(np.fromfile(path, np.uint8), cv2.IMREAD_UNCHANGED)
        if decoded is None:
            raise _Refusal("the picture is damaged: OpenCV cannot decode it")
        array = _native(np.asarray(decoded))
        if array.dtype != np.uint16 or array.shape[2] not in CHANNELS:
            raise _Refusal(f"levels of 16 bits would arrive as {array.dtype}")
    return array[..., [2, 1, 0, 3][: array.shape[2]]] if array.shape[2] > 2 else array  # OpenCV stores blue first


def _split_alpha(levels: Levels) -> tuple[Levels, Levels | None]:
    if levels.shape[2] in (2, 4):
        return levels[..., :-1], levels[..., -1:]
    return levels, None


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:200] or type(error).__name__
