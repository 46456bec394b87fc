"""Shims of one name for a test, whether or not the real package is installed."""

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from attn_core.compat import Provided, provide


@pytest.fixture
def shim() -> Iterator[Callable[..., Provided]]:
    """``shim("natten@0.14")``: forced, and taken away after the test."""
    active: list[Provided] = []

    def put(*names: str) -> Provided:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that natten is hidden, where it is installed
            active.append(provide(*names, force=True))
        return active[-1]

    yield put
    for provided in reversed(active):
        provided.restore()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Path]]:
    """``package("mmcv")``: a package of other people, importable until the end of the test; its folder."""
    names: list[str] = []
    monkeypatch.syspath_prepend(tmp_path)

    def make(name: str, text: str = "real = True\n") -> Path:
        names.append(name)
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text, encoding="utf-8")
        return tmp_path / name

    yield make
    for loaded in list(sys.modules):
        if loaded.partition(".")[0] in names:
            del sys.modules[loaded]
