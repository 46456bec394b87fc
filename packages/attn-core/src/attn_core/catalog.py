"""What a package offers by name: builders, what the tables say about them, and answers to names that do not exist.

Each file of a package's models folder ends with its own ``ENTRIES``; nothing else lists them. ::

    # package/models/davit.py
    CARD = Card(family="DaViT", paper="2204.03645", code="https://github.com/dingmyu/davit", license="Apache-2.0",
                test="models/test_davit.py")
    ENTRIES = [Entry("davit_tiny", partial(DaViT, depths=(1, 1, 3, 1)), CARD("28.3 M parameters", "top-1 82.8 %"))]

    # package/models/__init__.py
    CATALOG = Catalog("package.models")
    create_model, list_models, card = CATALOG.create, CATALOG.names, CATALOG.card
"""

import dataclasses
import difflib
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Ending of an error message about an unknown name: ``"; did you mean 'davit_tiny'?"``, or the choices if few."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {close[0]!r}?"
    if 0 < len(names) <= 12:
        return f"; choose from {', '.join(names)}"
    return ""


@dataclass(frozen=True)
class Card:
    """What the tables of the READMEs and ``info`` say about a model.

    Attributes:
        family: The published system, e.g. ``"BiFormer"``; variants of one system share it.
        paper: An arXiv id such as ``"2303.08810"``, or an address.
        code: Address of the official repository; empty if the authors released none.
        license: SPDX name of the official code's licence; empty if it names none.
        test: File, below the package's ``tests``, that compares with the official code or a peer.
        summary: What the variant is, in one line.
        published: What the authors report, e.g. ``"top-1 81.4 %"``; empty if nothing.
    """

    family: str
    paper: str
    code: str
    license: str
    test: str
    summary: str = ""
    published: str = ""

    def __call__(self, summary: str, published: str = "") -> "Card":
        """The card of one variant of this system."""
        return dataclasses.replace(self, summary=summary, published=published)


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A name of a catalogue. Names that start with ``test_`` are small siblings for tests and stand in no table.

    Attributes:
        name: What users write.
        build: ``build(**options)`` makes it with fresh weights.
        card: What the tables say.
        accepts: Further callables whose parameters are options too, where ``build`` hands its keywords on; options
            that neither names are refused. Empty: what ``build`` names, or anything if it takes ``**options``.
    """

    name: str
    build: Callable[..., T]
    card: Card
    accepts: tuple[Callable[..., Any], ...] = ()

    def options(self) -> set[str] | None:
        """Names of the options; None if ``build`` takes any."""
        parameters = inspect.signature(self.build).parameters.values()
        if not self.accepts and any(p.kind is p.VAR_KEYWORD for p in parameters):
            return None
        for accepted in self.accepts:
            parameters = [*parameters, *inspect.signature(accepted).parameters.values()]
        return {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}


class Catalog(Generic[T]):
    """The entries of a package, found by importing the files of one folder.

    Args:
        folder: Import name of the folder; every module below it may have a list ``ENTRIES``. It is imported when the
            first question is asked.
        kind: What an entry is, for messages: ``"model"`` gives ``unknown model 'x'``.
        caller: The public function that users call, for messages.
    """

    def __init__(self, folder: str, *, kind: str = "model", caller: str = "create_model") -> None:
        self.folder = folder
        self.kind = kind
        self.caller = caller

    @functools.cached_property
    def entries(self) -> dict[str, Entry[T]]:
        """All entries by name, sorted.

        Raises: ValueError: two files claim one name.
        """
        found: dict[str, Entry[T]] = {}
        owner: dict[str, str] = {}
        package = importlib.import_module(self.folder)
        for module in pkgutil.walk_packages(package.__path__, f"{self.folder}."):
            for entry in getattr(importlib.import_module(module.name), "ENTRIES", ()):
                if found.setdefault(entry.name, entry) is not entry:
                    first, second = owner[entry.name], module.name
                    raise ValueError(f"{self.folder}: {self.kind} {entry.name!r} stands in {first} and in {second}")
                owner.setdefault(entry.name, module.name)
        return dict(sorted(found.items()))

    def names(self) -> list[str]:
        """The names, sorted."""
        return list(self.entries)

    def entry(self, name: str, caller: str | None = None) -> Entry[T]:
        """The entry of a name.

        Raises: ValueError: unknown name; the message holds the nearest one.
        """
        if name not in self.entries:
            known = did_you_mean(str(name), self.entries)
            raise ValueError(f"{caller or self.caller}: unknown {self.kind} {name!r}{known}")
        return self.entries[name]

    def create(self, name: str, /, **options: Any) -> T:
        """Build what a name stands for, with fresh weights.

        Raises: ValueError: unknown name or option, with the nearest known one; a value that the class refuses.
        """
        entry = self.entry(name)
        known = entry.options()
        for option in options:
            if known is not None and option not in known:
                raise ValueError(f"{self.caller}: {name} has no option {option!r}{did_you_mean(option, known)}")
        return entry.build(**options)

    def card(self, name: str) -> Card:
        """What the tables say about a name.

        Raises: ValueError: unknown name, with the nearest known one.
        """
        return self.entry(name, "card").card

    def parameters(self, name: str) -> int:
        """Number of parameters of a network, built without memory."""
        import torch

        with torch.device("meta"):
            network: Any = self.create(name)
        return sum(parameter.numel() for parameter in network.parameters())

    def info(self, name: str) -> Mapping[str, object]:
        """Rows of a table about a name.

        Raises: ValueError: unknown name, with the nearest known one.
        """
        about = self.entry(name, "info").card
        return {
            self.kind: name,
            "system": about.family,
            "what": about.summary,
            "published": about.published or "nothing for this variant",
            "paper": f"arXiv {about.paper}" if about.paper[:4].isdigit() else about.paper,
            "official code": f"{about.code} ({about.license or 'no licence named'})" if about.code else "none released",
            "checked in": f"tests/{about.test}",
        }
