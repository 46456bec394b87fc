"""Fonts for captions in any script: matplotlib's where it has the letters, else an installed one that has."""

import functools
import logging
from pathlib import Path
from typing import Any

from PIL import ImageFont

logger = logging.getLogger(__name__)
FACE = "DejaVuSans.ttf"  # comes with matplotlib


def writable(text: str, size: int) -> tuple[str, Any]:
    """``text`` as one font can write it, and that font at ``size`` pixels.

    Letters that no installed font has are written as ``U+732B``, and a note says which they are.
    """
    needed = frozenset(letter for letter in text if letter.isprintable() and not letter.isspace())
    file, missing = _fitting(needed)
    shown = "".join(f"U+{ord(c):04X}" if c in missing else c if c.isprintable() else " " for c in text)
    return shown, ImageFont.load_default(size) if file is None else ImageFont.truetype(str(file), size)


@functools.lru_cache(maxsize=256)
def _fitting(needed: frozenset[str]) -> tuple[Path | None, frozenset[str]]:
    """The font that lacks the fewest letters, and those it lacks; None is Pillow's own, which knows Latin."""
    best, lacking = None, frozenset(letter for letter in needed if ord(letter) > 0xFF)
    for file in _files() if lacking else ():
        rest = needed - _letters(file)
        if len(rest) < len(lacking):
            best, lacking = file, rest
        if not lacking:
            break
    if lacking:
        logger.warning("no installed font has %r; pictures say U+… there (a Noto font would show them)",
                       "".join(sorted(lacking)))  # fmt: skip
    return best, lacking


@functools.cache
def _files() -> tuple[Path, ...]:
    """Fonts of matplotlib and of the machine; none without matplotlib, which reads their tables."""
    try:
        import matplotlib
        from matplotlib.font_manager import findSystemFonts
    except ImportError:
        return ()
    own = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / FACE
    return (own, *sorted(Path(file) for file in findSystemFonts()))


@functools.cache
def _letters(file: Path) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(str(file)).get_charmap()))
    except (RuntimeError, OSError, ValueError):  # a font that is damaged or of another kind
        return frozenset()
