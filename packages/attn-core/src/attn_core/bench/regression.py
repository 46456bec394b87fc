"""Slower than before? Ratios to a peer of the same run, compared with those of stored results.

Times of two machines, or of one machine on two days, are not comparable; the ratio to a peer that computes the same
thing in the same minute is.
"""

from typing import Any

from .case import OWN
from .measure import Row

ALLOWED = 1.15
PREFERRED_ANCHOR = "sdpa"

Key = tuple[str, str, str, str]


def regressions(rows: list[Row], base: list[Row]) -> list[str]:
    """One line for each of our timings whose ratio grew by more than 15 % and beyond the spread of both runs."""
    now, before = _by_place(rows), _by_place(base)
    lines = []
    for place, timed in now.items():
        stored = before.get(place, {})
        peers = [name for name in timed if name in stored and name not in OWN]
        if not peers:
            continue
        anchor = PREFERRED_ANCHOR if PREFERRED_ANCHOR in peers else peers[0]
        for name in OWN:
            if name in timed and name in stored:
                ratio, low, _ = _ratio(timed[name], timed[anchor])
                old, _, high = _ratio(stored[name], stored[anchor])
                if ratio > ALLOWED * old and low > high:
                    _, case, dtype, kind = place
                    lines.append(f"{case}, {dtype}, {kind}, {name}: {ratio:.2f} × {anchor}, was {old:.2f}")
    return lines


def _by_place(rows: list[Row]) -> dict[Key, dict[str, Row]]:
    places: dict[Key, dict[str, Row]] = {}
    for row in rows:
        if row["ms"] is not None:
            places.setdefault((row["op"], row["case"], row["dtype"], row["pass"]), {})[row["provider"]] = row
    return places


def _ratio(own: dict[str, Any], peer: dict[str, Any]) -> tuple[float, float, float]:
    """Ratio of the medians, and the smallest and largest that the p20–p80 ranges allow."""
    return own["ms"] / peer["ms"], own["p20"] / peer["p80"], own["p80"] / peer["p20"]
