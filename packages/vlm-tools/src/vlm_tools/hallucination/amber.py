"""AMBER: queries and annotations from local files, the scores of descriptions, the accuracy of yes/no answers.

Paper: Wang et al., AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation, arXiv 2311.07397.
Official code: junyangwang0410/AMBER, ``data/``, ``inference.py``.

The same: which words count (those of ``relation.json``), an object is named by its own word or a related one, safe
words are passed over, CHAIR, Cover, Hal, Cog. Different: any word of the list counts, singular or plural, where the
official code asks NLTK whether it is a noun; words that are similar without being related are left to ``similar``
(official: spaCy's ``en_core_web_lg`` vectors, cosine above 0.8, a download).
Checked in ``tests/hallucination/test_amber.py``.
"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vlm_tools.hallucination.chair import singular
from vlm_tools.hallucination.files import is_number, is_text, is_texts, read_json, read_rows


@dataclass(frozen=True)
class AmberQuery:
    """One query.

    Attributes:
        kind: ``"generative"`` or ``"discriminative-…"``.
        truth: "yes" or "no", or the objects of the image.
        tempting: objects that are likely to be hallucinated; empty in the yes/no part.
    """

    id: int
    image: str
    query: str
    kind: str
    truth: str | tuple[str, ...]
    tempting: tuple[str, ...] = ()

    @property
    def objects(self) -> tuple[str, ...]:
        """Objects of the image; empty in the yes/no part."""
        return () if isinstance(self.truth, str) else self.truth


def read_amber(queries: Path, annotations: Path) -> list[AmberQuery]:
    """Queries of a ``query_*.json`` with their annotations from ``annotations.json``.

    Raises:
        ValueError: a file cannot be read or is no such list, or a query has no annotation.
    """
    fields = {"id": is_number, "type": is_text, "truth": _is_truth}
    truth = {int(row["id"]): row for row in read_rows(annotations, "read_amber", fields)}
    found = []
    for row in read_rows(queries, "read_amber", {"id": is_number, "image": is_text, "query": is_text}):
        number = int(row["id"])
        if number not in truth:
            raise ValueError(f"read_amber: query {number} of {queries} has no annotation in {annotations}")
        about = truth[number]
        right = about["truth"] if isinstance(about["truth"], str) else tuple(about["truth"])
        lure = about.get("hallu") or ()
        if lure and not is_texts(lure):
            raise ValueError(f"read_amber: {annotations}, query {number}: 'hallu' must be a list of objects")
        found.append(AmberQuery(number, row["image"], row["query"], about["type"], right, tuple(lure)))
    return found


def _is_truth(value: object) -> bool:
    return is_texts(value) or value in ("yes", "no")


def accuracy(queries: Sequence[AmberQuery], answers: Sequence[bool | None]) -> dict[str, float]:
    """Share of right answers per kind of yes/no query and ``"all"``; None is wrong.

    Raises:
        ValueError: numbers differ, or there is no yes/no query.
    """
    if len(queries) != len(answers):
        raise ValueError(f"amber.accuracy: {len(queries)} queries need as many answers, got {len(answers)}")
    hits: dict[str, list[bool]] = {}
    for query, said in zip(queries, answers, strict=True):
        if isinstance(query.truth, str):
            right = said is not None and said == (query.truth == "yes")
            for kind in (query.kind, "all"):
                hits.setdefault(kind, []).append(right)
    if not hits:
        raise ValueError("amber.accuracy: there is no yes/no query among the queries")
    return {kind: sum(found) / len(found) for kind, found in hits.items()}


@dataclass(frozen=True)
class AmberScores:
    """Scores of descriptions, shares in [0, 1].

    Attributes:
        chair: share of named objects that are absent.
        cover: share of the objects of the images that are named.
        hal: share of descriptions that name an absent object.
        cog: share of the tempting absent objects that are named.
        hallucinated: one flag per description, for paired tests.
    """

    chair: float
    cover: float
    hal: float
    cog: float
    hallucinated: tuple[bool, ...]


def read_relations(path: Path) -> dict[str, list[str]]:
    """Object → related words, from the released ``relation.json``.

    Raises:
        ValueError: it cannot be read, or is no such file.
    """
    found = read_json(path, "read_relations")
    if not isinstance(found, dict) or not all(map(is_texts, found.values())):
        raise ValueError(f"read_relations: {path} must map each object to a list of words")
    return found


def generative(
    queries: Sequence[AmberQuery],
    texts: Sequence[str],
    related: Mapping[str, Sequence[str]],
    *,
    safe: Collection[str] = (),
    similar: Callable[[str, str], bool] | None = None,
) -> AmberScores:
    """Scores of descriptions.

    Args:
        queries: of the generative part.
        texts: the descriptions.
        related: object → related words, as from `read_relations`.
        safe: words that never count as absent, the released ``safe_words.txt``.
        similar: whether two words mean the same; None: only equal ones do.

    Raises:
        ValueError: numbers differ, there is no query, or one of the yes/no part.
    """
    if not queries or len(queries) != len(texts):
        raise ValueError(f"amber.generative: {len(queries)} queries need as many texts and at least one")
    known = {*related, *(word for words in related.values() for word in words)}
    flags: list[bool] = []
    wrong = mentions = covered = present = tempted = tempting = 0
    for query, text in zip(queries, texts, strict=True):
        if isinstance(query.truth, str):
            raise ValueError(f"amber.generative: query {query.id} is a yes/no question")
        words = [singular(word, known) for word in re.findall(r"[a-z]+", text.lower())]
        named = [word for word in words if word in known]
        truth, lure = _Objects(query.truth, related, similar), _Objects(query.tempting, related, similar)
        absent = 0
        for word in named:
            if word in safe or truth.find(word, close=False):
                continue
            lure.find(word, close=True)
            absent += not truth.find(word, close=True)
        flags.append(absent > 0)
        wrong, mentions = wrong + absent, mentions + len(named)
        covered, present = covered + len(truth.found), present + len(query.truth)
        tempted, tempting = tempted + len(lure.found), tempting + len(query.tempting)
    return AmberScores(
        chair=wrong / max(mentions, 1),
        cover=covered / max(present, 1),
        hal=sum(flags) / len(flags),
        cog=tempted / max(tempting, 1),
        hallucinated=tuple(flags),
    )


class _Objects:
    """Objects of one image by their words, the related words first, and which of them a text has named."""

    def __init__(
        self,
        names: Sequence[str],
        related: Mapping[str, Sequence[str]],
        similar: Callable[[str, str], bool] | None,
    ) -> None:
        self.words = [(word, number) for number, name in enumerate(names) for word in related.get(name, ())]
        self.words += [(name, number) for number, name in enumerate(names)]
        self.similar = similar
        self.found: set[int] = set()

    def find(self, word: str, *, close: bool) -> bool:
        """Note the first object that the word names; ``close``: a similar word will do."""
        for other, number in self.words:
            if word == other or (close and self.similar is not None and self.similar(word, other)):
                self.found.add(number)
                return True
        return False
