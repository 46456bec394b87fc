"""Name → builder, with the nearest name suggested on a miss."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

from attn_core.catalog import did_you_mean

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class ModelCard:
    """What the tables of the READMEs and ``info`` say about a model.

    Every task package has a module ``models`` with ``list_models()``, ``create_model(name, **options)`` and
    ``card(name)``; names that start with ``test_`` are small siblings for tests and stand in no table.

    Attributes:
        family: The published system, e.g. ``"BiFormer"``; variants of one system share it.
        summary: What the variant is, in one line.
        paper: An arXiv id such as ``"2303.08810"``, or an address.
        code: Address of the official repository; empty if the authors released none.
        license: SPDX name of the official code's licence; empty if it names none.
        test: File of the package's ``tests`` that compares with the official code or a peer.
        published: What the authors report, e.g. ``"top-1 81.4 %"``; empty if nothing.
    """

    family: str
    summary: str
    paper: str
    code: str
    license: str
    test: str
    published: str = ""


class Registry(Generic[T]):
    """Builders by name.

    Args:
        kind: What the names are, for messages: ``"model"`` gives ``unknown model 'x'``.
        caller: The public function that users call, for messages: ``"create_model"``.
    """

    def __init__(self, kind: str, caller: str) -> None:
        self.kind = kind
        self.caller = caller
        self._builders: dict[str, Callable[..., T]] = {}

    def register(self, builder: Callable[P, T]) -> Callable[P, T]:
        """Decorator: the function's name becomes the registered name.

        Raises:
            ValueError: if the name is taken by another function.
        """
        name = builder.__name__
        if name in self._builders:
            raise ValueError(f"{self.caller}: {self.kind} {name!r} is registered already; choose another name")
        self._builders[name] = builder
        return builder

    def get(self, name: str) -> Callable[..., T]:
        """The builder of ``name``.

        Raises:
            ValueError: if nothing of that name is registered; the message holds the nearest name.
        """
        if name not in self._builders:
            raise ValueError(f"{self.caller}: unknown {self.kind} {name!r}{did_you_mean(name, self._builders)}")
        return self._builders[name]

    def create(self, name: str, /, *args: Any, **kwargs: Any) -> T:
        """Call the builder of ``name``."""
        return self.get(name)(*args, **kwargs)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._builders))

    def __contains__(self, name: object) -> bool:
        return name in self._builders

    def __len__(self) -> int:
        return len(self._builders)
