"""The catalogue: entries found in a folder, unknown names and options answered with the nearest."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from attn_core.catalog import Card, Catalog, Entry

CARD = Card(family="Toy", paper="1706.03762", code="", license="", test="models/test_toy.py")
MODEL = """
from functools import partial
from torch import nn
from attn_core.catalog import Card, Entry
CARD = Card(family="Toy", paper="1706.03762", code="", license="", test="models/test_toy.py")
class Toy(nn.Linear):
    def __init__(self, width: int = 3, *, bias: bool = True) -> None:
        super().__init__(width, width, bias)
ENTRIES = [
    Entry("{name}", Toy, CARD("twelve parameters", "top-1 1 %")),
    Entry("test_{name}", partial(Toy, width=1), CARD("for tests")),
]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A package with a model file and one in a folder of its own."""
    name = f"toys_{tmp_path.name.replace('-', '_')}"
    for place, model in (("", "toy"), ("big/", "giant")):
        file = tmp_path / name / f"{place}{model}.py"
        file.parent.mkdir(exist_ok=True)
        (file.parent / "__init__.py").touch()
        file.write_text(MODEL.format(name=model))
    monkeypatch.syspath_prepend(tmp_path)
    yield name
    for module in [module for module in sys.modules if module.startswith(name)]:
        del sys.modules[module]


def test_every_file_below_the_folder_is_found(folder: str) -> None:
    catalog = Catalog(folder)
    assert catalog.names() == ["giant", "test_giant", "test_toy", "toy"]
    assert catalog.create("toy", bias=False).bias is None
    assert catalog.parameters("toy") == 12
    assert catalog.card("giant").published == "top-1 1 %"
    assert catalog.info("toy")["paper"] == "arXiv 1706.03762"


def test_unknown_names_and_options_are_answered_with_the_nearest(folder: str) -> None:
    catalog = Catalog(folder)
    with pytest.raises(ValueError, match=r"create_model: unknown model 'tpy'; did you mean 'toy'\?"):
        catalog.create("tpy")
    with pytest.raises(ValueError, match=r"create_model: toy has no option 'widht'; did you mean 'width'\?"):
        catalog.create("toy", widht=3)
    with pytest.raises(ValueError, match=r"card: unknown model 'gaint'; did you mean 'giant'\?"):
        catalog.card("gaint")


def test_two_files_cannot_claim_one_name(folder: str, tmp_path: Path) -> None:
    (tmp_path / folder / "copy.py").write_text(MODEL.format(name="toy"))
    with pytest.raises(ValueError, match=r"model 'toy' stands in .*\.copy and in .*\.toy"):
        Catalog(folder).names()


def test_options_behind_keywords_are_those_of_what_takes_them() -> None:
    def host(width: int = 1) -> None: ...

    def build(depth: int = 1, **options: int) -> None: ...

    assert Entry("any", build, CARD).options() is None
    assert Entry("host", build, CARD, accepts=(host,)).options() == {"depth", "width"}
