"""What all searchers of shelves share, how their paths are drawn from scores, and three that know next to nothing.

A searcher scores, at the start of a path and behind each of its objects, what is looked at next: the P objects, END and
padding. Checked in: ``scanpaths/test_searchers.py``.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

PAD = -1  # in paths, behind their end
NEVER = -1e4  # score of what a searcher rules out; finite, so that softmax and its gradient are


class Seen(NamedTuple):
    """Shelves as a searcher has read them: memory (B, N, C), objects (B, P, D), cells (B, P, 2), target (B,)."""

    memory: Tensor
    objects: Tensor
    cells: Tensor
    target: Tensor

    def repeat(self, times: int) -> "Seen":
        """Each shelf so many times, one behind the other."""
        return Seen(*(part.repeat_interleave(times, 0) for part in self))


class Searcher(Protocol):
    """Networks and baselines."""

    def encode(
        self, crops: Float[Tensor, "B P 3 Y X"], target: Int[Tensor, " B"], cells: Int[Tensor, "B P 2"] | None = None
    ) -> Seen:
        """Read shelves."""
        ...

    def scores(self, seen: Seen, path: Int[Tensor, "B T"]) -> Float[Tensor, "B T1 P2"]:
        """Score what comes next, behind every prefix of the paths."""
        ...


def grid_cells(rows: int, columns: int, device: torch.device | None = None) -> Int[Tensor, "1 P 2"]:
    """Row and column of each object, counted row by row."""
    index = torch.arange(rows * columns, device=device)
    return torch.stack([index // columns, index % columns], -1).unsqueeze(0)


@torch.no_grad()
def decode(
    searcher: Searcher,
    seen: Seen,
    *,
    sample: bool = False,
    max_length: int = 20,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """A path of each shelf: objects up to END, which is not among them; at least one, at most ``max_length``.

    END cannot be the first choice, padding never is one.

    Args:
        sample: draw from the softmax of the scores instead of taking the largest. generator: of the draws.

    Raises: ValueError for a length below 1.
    """
    if max_length < 1:
        raise ValueError(f"decode: max_length must be at least 1, got max_length={max_length}")
    batch, count = seen.objects.shape[:2]
    path = seen.target.new_zeros(batch, 0)
    going = torch.ones(batch, dtype=torch.bool, device=path.device)
    while path.shape[1] < max_length and bool(going.any()):
        scores = searcher.scores(seen, path)[:, -1, : count + 1].float()
        if not path.shape[1]:
            scores = scores[:, :count]
        if sample:
            chosen = torch.multinomial(scores.softmax(1), 1, generator=generator)[:, 0]
        else:
            chosen = scores.argmax(1)
        going = going & (chosen != count)
        path = torch.cat([path, torch.where(going, chosen, PAD)[:, None]], 1)
    return [[place for place in row if place != PAD] for row in path.tolist()]


def padded(paths: Sequence[Sequence[int]], device: torch.device | None = None) -> Int[Tensor, "B T"]:
    """Paths of different lengths as one tensor."""
    longest = max(map(len, paths), default=0)
    rows = [[*path, *[PAD] * (longest - len(path))] for path in paths]
    return torch.tensor(rows, dtype=torch.int64, device=device).view(len(paths), longest)


class _Baseline(ABC):
    """Looks at objects that were not looked at, each kind with its own preference, and ends at the target."""

    def encode(
        self, crops: Float[Tensor, "B P 3 Y X"], target: Int[Tensor, " B"], cells: Int[Tensor, "B P 2"] | None = None
    ) -> Seen:
        """Pixels as they are; cells must be given."""
        if cells is None:
            raise ValueError(f"{type(self).__name__}: needs cells, the row and column of each object; see grid_cells")
        return Seen(target.new_zeros(len(target), 0, 0), crops.flatten(2), cells.expand(len(crops), -1, -1), target)

    @abstractmethod
    def preferences(self, seen: Seen, last: Int[Tensor, " B"]) -> Float[Tensor, "B P"]:
        """Scores of the objects behind a path that ends with ``last``, −1 at the start."""

    def scores(self, seen: Seen, path: Int[Tensor, "B T"]) -> Float[Tensor, "B T1 P2"]:
        """END behind the target, else the preferences; what was visited is ruled out."""
        batch, count = seen.cells.shape[:2]
        rows = torch.arange(batch, device=path.device)
        visited = torch.zeros(batch, count, dtype=torch.bool, device=path.device)
        found = []
        for step in range(path.shape[1] + 1):
            last = path[:, step - 1] if step else torch.full_like(seen.target, PAD)
            visited[rows[last >= 0], last[last >= 0]] = True
            own = self.preferences(seen, last).masked_fill(visited, NEVER)
            done = (last == seen.target)[:, None]
            end = torch.where(done | visited.all(1, keepdim=True), 0.0, NEVER)
            found.append(torch.cat([own.masked_fill(done, NEVER), end, torch.full_like(end, NEVER)], 1))
        return torch.stack(found, 1)


class Uniform(_Baseline):
    """Any object that was not looked at, with equal chances."""

    def preferences(self, seen: Seen, last: Int[Tensor, " B"]) -> Float[Tensor, "B P"]:  # noqa: ARG002  the others' signature
        """No preference."""
        return seen.objects.new_zeros(seen.cells.shape[:2])


class Nearest(_Baseline):
    """The nearest object that was not looked at; at the start the one nearest to the middle of the shelf."""

    def preferences(self, seen: Seen, last: Int[Tensor, " B"]) -> Float[Tensor, "B P"]:
        """Minus the distance, in cells."""
        cells = seen.cells.to(seen.objects.dtype)
        middle = (cells.amax(1) + cells.amin(1)) / 2
        here = cells[torch.arange(len(cells), device=cells.device), last.clamp(min=0)]
        here = torch.where((last >= 0)[:, None], here, middle)
        return -(cells - here[:, None]).square().sum(2).sqrt()


class MostSimilar(_Baseline):
    """The object that was not looked at whose pixels correlate best with the target's.

    Args:
        sharpness: factor of the correlation, which a path that is drawn at random follows.
    """

    def __init__(self, sharpness: float = 5.0) -> None:
        self.sharpness = sharpness

    def preferences(self, seen: Seen, last: Int[Tensor, " B"]) -> Float[Tensor, "B P"]:  # noqa: ARG002  the others' signature
        """Correlations with the target."""
        pixels = seen.objects - seen.objects.mean(2, keepdim=True)
        pixels = torch.nn.functional.normalize(pixels, dim=2)
        goal = pixels[torch.arange(len(pixels), device=pixels.device), seen.target]
        return self.sharpness * (pixels @ goal.unsqueeze(2)).squeeze(2)


BASELINES = {"uniform": Uniform(), "nearest": Nearest(), "similarity": MostSimilar()}
