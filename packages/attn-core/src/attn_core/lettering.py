"""Names in any script on matplotlib's pictures: fonts that have the letters, or numbers in place of the names.

matplotlib draws a box for a letter that its font lacks, and DejaVu lacks Chinese, Japanese, Korean and many others.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

_LOGGER = logging.getLogger(__name__)


@contextmanager
def lettered(names: Sequence[str]) -> Iterator[list[str]]:
    """Within the block matplotlib has a font for every letter of the names that it gives.

    ::

        with lettered(classes) as shown:  # as given, or "class 3" for those that no installed font can write
            axis.set_yticklabels(shown)
            figure.savefig(path)

    Names that cannot be drawn are told once, as a warning of this module's logger.
    """
    import matplotlib

    families, missing = fonts_for("".join(names))
    unwritable = [index for index, name in enumerate(names) if missing & set(name)]
    if unwritable:
        _LOGGER.warning(
            "no installed font has the letters %s; pictures say 'class %d' for %r and so on (install e.g. Noto Sans)",
            "".join(sorted(missing)[:12]), unwritable[0], names[unwritable[0]],
        )  # fmt: skip
    shown = [f"class {index}" if index in set(unwritable) else _plain(name) for index, name in enumerate(names)]
    with matplotlib.rc_context({"font.family": ["DejaVu Sans", *families]}):
        yield shown


def _plain(name: str) -> str:
    """A dollar sign is a dollar sign, not mathematics."""
    return name.replace("$", r"\$")


def fonts_for(text: str) -> tuple[list[str], set[str]]:
    """Families that together have what DejaVu Sans lacks of ``text``, and the letters that no installed font has."""
    from matplotlib import font_manager

    missing = {letter for letter in text if not letter.isspace()}
    missing -= _letters(font_manager.findfont("DejaVu Sans"))
    families: list[str] = []
    if missing:
        # Regular fonts first, in an order that does not depend on the file system.
        for font in sorted(
            font_manager.fontManager.ttflist, key=lambda f: (f.style != "normal", f.weight != 400, f.name)
        ):
            if font.name.startswith("Last Resort"):  # matplotlib's own: a box for every letter there is
                continue
            covered = missing & _letters(font.fname)
            if covered:
                families.append(font.name)
                missing -= covered
            if not missing:
                break
    return families, missing


@cache
def _letters(file: str) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    try:
        return frozenset(map(chr, FT2Font(file).get_charmap()))
    except (OSError, RuntimeError, ValueError):
        return frozenset()  # a font that cannot be opened has no letters
