"""A font for class names in any script: matplotlib's own where it has the characters, else an installed one.

Checked in: ``pictures/test_boxes.py``.
"""

import functools
import logging
from pathlib import Path

from PIL import ImageFont

logger = logging.getLogger(__name__)


def writable(text: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """``text`` as one font can write it, and that font at ``size`` pixels.

    Characters that no installed font has are written as ``U+732B``, and a note says which they are.
    """
    needed = frozenset(ord(character) for character in text if character.isprintable() and not character.isspace())
    path, missing = _font(needed)
    shown = "".join(f"U+{ord(c):04X}" if ord(c) in missing or not c.isprintable() else c for c in text)
    return shown, ImageFont.truetype(str(path), size)


@functools.lru_cache(maxsize=256)
def _font(needed: frozenset[int]) -> tuple[Path, frozenset[int]]:
    """The font that lacks the fewest of the characters, and those it lacks."""
    base = _base()
    missing = needed - _characters(base)
    if not missing:
        return base, missing
    best, lacking = base, missing
    for path in _installed():
        rest = needed - _characters(path)
        if len(rest) < len(lacking):
            best, lacking = path, rest
        if not lacking:
            return best, lacking
    shown = "".join(map(chr, sorted(lacking)))
    logger.warning("no installed font has %r; such characters are written as U+…; a Noto font would show them", shown)
    return best, frozenset(lacking)


def _base() -> Path:
    import matplotlib

    return Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"


@functools.cache
def _installed() -> tuple[Path, ...]:
    from matplotlib.font_manager import findSystemFonts

    return tuple(sorted(Path(file) for file in findSystemFonts()))


@functools.lru_cache(maxsize=512)
def _characters(path: Path) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(FT2Font(str(path)).get_charmap())
    except (RuntimeError, OSError):  # a font file that is damaged or of another kind
        return frozenset()


def counted(number: int, one: str, many: str) -> str:
    """``1 box``, ``2 boxes``."""
    return f"{number} {one if number == 1 else many}"
