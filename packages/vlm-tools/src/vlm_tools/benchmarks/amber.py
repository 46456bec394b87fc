"""AMBER: queries and annotations from local files, and the accuracy of its yes/no part.

Paper: Wang et al., AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation, arXiv 2311.07397.
Official code: junyangwang0410/AMBER, ``data/``, ``inference.py``. The generative part is scored there with spaCy's word
vectors, which are a download; `objects` gives what `vlm_tools.benchmarks.chair` needs instead.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


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
        ValueError: a file is no such list, or a query has no annotation. OSError: a file cannot be read.
    """
    truth: dict[int, Mapping[str, Any]] = {int(row["id"]): row for row in _rows(annotations, ("id", "type", "truth"))}
    found = []
    for row in _rows(queries, ("id", "image", "query")):
        number = int(row["id"])
        if number not in truth:
            raise ValueError(f"read_amber: query {number} of {queries} has no annotation in {annotations}")
        about = truth[number]
        right = about["truth"] if isinstance(about["truth"], str) else tuple(about["truth"])
        found.append(
            AmberQuery(number, row["image"], row["query"], about["type"], right, tuple(about.get("hallu", ())))
        )
    return found


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


def _rows(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"read_amber: {path} is no JSON file ({error})") from None
    if not isinstance(rows, list) or any(not isinstance(row, dict) or not set(keys) <= set(row) for row in rows):
        raise ValueError(f"read_amber: {path} must be a list of objects with {', '.join(keys)}")
    return rows
