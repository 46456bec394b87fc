"""Stratified splits that no random generator, version or machine can change."""

import hashlib
from collections.abc import Sequence

import numpy as np


def stratified_parts(
    labels: Sequence[int] | np.ndarray,
    fractions: Sequence[float],
    *,
    salt: str,
    names: Sequence[str] | None = None,
    at_least: int = 0,
) -> list[np.ndarray]:
    """Cut the samples of every class into parts, in an order given by SHA-256 of ``salt`` and the sample's name.

    Args:
        fractions: share of each part but the last, which takes the rest.
        names: of the samples; default: their numbers. With names a sample keeps its place when others come or go.
        at_least: samples of each class in each part but the last, as long as one is left for the last.

    Returns:
        sorted sample numbers of each part; together they are all samples, each once.
    """
    labels = np.asarray(labels)
    key = [hashlib.sha256(f"{salt}:{name}".encode()).digest() for name in names or range(len(labels))]
    parts: list[list[int]] = [[] for _ in range(len(fractions) + 1)]
    for label in np.unique(labels):
        members = sorted(np.flatnonzero(labels == label).tolist(), key=key.__getitem__)
        start = 0
        for part, fraction in zip(parts, fractions, strict=False):
            stop = start + min(max(round(fraction * len(members)), at_least), max(0, len(members) - 1 - start))
            part.extend(members[start:stop])
            start = stop
        parts[-1].extend(members[start:])
    return [np.sort(np.array(part, dtype=np.int64)) for part in parts]
