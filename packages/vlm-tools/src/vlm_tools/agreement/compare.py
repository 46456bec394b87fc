"""Readings beside one another: agreement with its chance, faithfulness, and hits where the truth is known."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vlm_tools.agreement.faithfulness import curves, pointing_game
from vlm_tools.agreement.ranks import MEASURES, Chance, against_chance

RANDOM = "random order"


@dataclass
class Agreement:
    """What `compare` found.

    Attributes:
        names: of the maps.
        pairs: measure → (name, name) → correlation and chance.
        areas: name → mean areas under the deletion and the insertion curve; a random order stands beside them.
        hits: name → share of maps that point at the truth; ``"chance"`` is the truth's share of cells.
    """

    names: tuple[str, ...]
    pairs: dict[str, dict[tuple[str, str], Chance]]
    areas: dict[str, tuple[float, float]] = field(default_factory=dict)
    hits: dict[str, float] = field(default_factory=dict)

    def lines(self) -> Iterator[str]:
        """The matrices and tables as text."""
        width = max(len(name) for name in (*self.names, RANDOM))
        titles = {"kendall": "Kendall's tau", "top_k": "top-k Kendall", "weighted": "weighted tau"}
        for measure, found in self.pairs.items():
            yield f"{titles[measure]} (what chance gives; * p < 0.05, one-sided)"
            for number, name in enumerate(self.names[1:], start=1):
                cells = [found[other, name] for other in self.names[:number]]
                told = "  ".join(f"{c.observed:+.2f} ({c.chance:+.2f}){'*' if c.p < 0.05 else ' '}" for c in cells)
                yield f"  {name:{width}}  {told}"
            yield f"  {'':{width}}  " + "  ".join(f"{name[:14]:14}" for name in self.names[:-1])
        if self.areas:
            yield "areas under the curves: deletion (small is faithful), insertion (large is)"
            for name, (deletion, insertion) in self.areas.items():
                yield f"  {name:{width}}  {deletion:.3f}  {insertion:.3f}"
        if self.hits:
            yield "pointing game: share of maps whose peak lies on the truth"
            for name, share in self.hits.items():
                yield f"  {name:{width}}  {share:.3f}"

    def row(self) -> dict[str, Any]:
        """Plain numbers, for a file."""
        pairs = {m: [[*two, *chance] for two, chance in found.items()] for m, found in self.pairs.items()}
        return {"names": list(self.names), "pairs": pairs, "areas": self.areas, "hits": self.hits}


def compare(
    maps: Mapping[str, Float[Tensor, "S T"]],
    *,
    k: int | Literal["nonzero"] = 5,
    permutations: int = 200,
    truth: Bool[Tensor, "S T"] | None = None,
    seed: int = 0,
) -> Agreement:
    """Agreement of every two maps of the same S samples, and their hits.

    Args:
        k: of top-k Kendall.
        truth: True at the cells that a map should point at.

    Raises:
        ValueError: fewer than two maps; as `against_chance` and `pointing_game`.
    """
    names = tuple(maps)
    if len(names) < 2:
        raise ValueError(f"compare: agreement needs two maps or more, got {len(names)}")
    pairs: dict[str, dict[tuple[str, str], Chance]] = {
        measure: {
            (one, other): against_chance(maps[one], maps[other], measure, k=k, permutations=permutations, seed=seed)
            for place, one in enumerate(names)
            for other in names[place + 1 :]
        }
        for measure in MEASURES
    }
    found = Agreement(names, pairs)
    if truth is not None:
        found.hits = {name: float(pointing_game(heat, truth).mean()) for name, heat in maps.items()}
        found.hits["chance"] = float(truth.double().mean())
    return found


def areas(
    model: Any,
    inputs: Mapping[str, Any],
    row: int,
    target: int,
    maps: Mapping[str, Float[Tensor, " T"]],
    *,
    steps: int = 8,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Name → areas under the deletion and insertion curve for one token; a random order stands beside them.

    Raises:
        ValueError: as `curves`.
    """
    first = next(iter(maps.values()))
    chance = torch.rand(first.shape, generator=torch.Generator().manual_seed(seed))
    found = {}
    for name, heat in {**maps, RANDOM: chance}.items():
        drawn = curves(model, inputs, row, target, heat, steps=steps)
        found[name] = drawn.deletion_area, drawn.insertion_area
    return found


def mean_areas(rows: list[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    """Means over tokens or scenes of what `areas` gives.

    Raises:
        ValueError: no row.
    """
    if not rows:
        raise ValueError("mean_areas: there is no row")
    return {
        name: (sum(row[name][0] for row in rows) / len(rows), sum(row[name][1] for row in rows) / len(rows))
        for name in rows[0]
    }
