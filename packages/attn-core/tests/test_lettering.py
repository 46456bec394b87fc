"""Class names in any script: every letter on a picture has a glyph, or the name is a number and somebody is told."""

import logging
import warnings
from pathlib import Path

import pytest

from attn_core.lettering import fonts_for, lettered

matplotlib = pytest.importorskip("matplotlib")


def drawn(names: list[str], path: Path) -> list[str]:
    """Write the names into a PNG; a letter without a glyph warns, and a warning is an error."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with lettered(names) as shown, warnings.catch_warnings():
        warnings.simplefilter("error")
        figure = Figure()
        FigureCanvasAgg(figure)
        for row, name in enumerate(shown):
            figure.text(0, row / len(shown), name)
        figure.savefig(path)
    return shown


def test_latin_greek_and_cyrillic_need_no_other_font(tmp_path: Path) -> None:
    names = ["Straße", "γάτα", "кошка", "naïve"]
    assert fonts_for("".join(names)) == ([], set())
    assert drawn(names, tmp_path / "a.png") == names


def test_names_without_a_font_are_numbered_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from matplotlib import font_manager

    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(font_manager.fontManager, "ttflist", [])
        assert drawn(["cat", "猫", "犬"], tmp_path / "a.png") == ["cat", "class 1", "class 2"]
    assert "no installed font has the letters 犬猫; pictures say 'class 1' for '猫'" in caplog.text


def test_whatever_is_installed_no_letter_becomes_a_box(tmp_path: Path) -> None:
    families, _ = fonts_for("猫개")
    assert not [name for name in families if name.startswith("Last Resort")]  # its glyphs are boxes
    drawn(["猫", "개", "ไทย", "العربية", "हिन्दी", "\U00010384", "🐈"], tmp_path / "a.png")


def test_dollar_signs_are_letters(tmp_path: Path) -> None:
    drawn(["$5", "a_$b", "$\\frac$"], tmp_path / "a.png")
