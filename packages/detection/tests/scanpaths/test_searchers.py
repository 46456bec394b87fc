"""Paths out of scores, and what the baselines prefer."""

import pytest
import torch
from torch import Tensor

from detection.scanpaths.searchers import (
    BASELINES,
    NEVER,
    MostSimilar,
    Nearest,
    Seen,
    Uniform,
    decode,
    grid_cells,
    padded,
)


class Fixed:
    """Scores that depend on the step alone: a row for each."""

    def __init__(self, rows: list[list[float]]) -> None:
        self.rows = torch.tensor(rows)

    def encode(self, crops: Tensor, target: Tensor, cells: Tensor | None = None) -> Seen:
        raise NotImplementedError

    def scores(self, seen: Seen, path: Tensor) -> Tensor:
        steps = path.shape[1] + 1
        return self.rows[torch.arange(steps).clamp(max=len(self.rows) - 1)].expand(len(seen.target), -1, -1)


def seen(batch: int = 1, objects: int = 2) -> Seen:
    return Seen(torch.zeros(batch, 0, 0), torch.zeros(batch, objects, 1), torch.zeros(batch, objects, 2),
                torch.zeros(batch, dtype=torch.long))  # fmt: skip


def test_end_is_never_first_and_padding_never_chosen() -> None:
    scores = Fixed([[0.0, 1.0, 9.0, 99.0], [2.0, 1.0, 0.0, 99.0], [0.0, 0.0, 1.0, 99.0]])
    assert decode(scores, seen()) == [[1, 0]]
    generator = torch.Generator().manual_seed(0)
    for path in decode(scores, seen(40), sample=True, generator=generator, max_length=5):
        assert 1 <= len(path) <= 5
        assert set(path) <= {0, 1}


def test_paths_end_at_the_longest_length() -> None:
    assert decode(Fixed([[0.0, 1.0, -9.0, 0.0]]), seen(2), max_length=3) == [[1, 1, 1]] * 2
    assert decode(Fixed([[0.0, 1.0, -9.0, 0.0]]), seen(0)) == []
    with pytest.raises(ValueError, match="decode: max_length must be at least 1, got max_length=0"):
        decode(Fixed([[0.0] * 4]), seen(), max_length=0)


def test_drawn_paths_follow_the_softmax_and_equal_seeds_draw_alike() -> None:
    scores = Fixed([[0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 50.0]])
    draws = [decode(scores, seen(3000), sample=True, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    share = sum(path[0] == 1 for path in draws[0]) / 3000
    assert share == pytest.approx(torch.tensor([0.0, 1.0]).softmax(0)[1].item(), abs=0.03)
    ended = sum(len(path) == 1 for path in draws[0]) / 3000
    assert ended == pytest.approx(torch.tensor([0.0, 0.0, 1.0]).softmax(0)[2].item(), abs=0.03)


def test_shelves_are_repeated_one_behind_the_other() -> None:
    shelf = Seen(torch.arange(2.0).view(2, 1, 1), torch.zeros(2, 1, 1), torch.zeros(2, 1, 2), torch.tensor([3, 4]))
    assert shelf.repeat(2).target.tolist() == [3, 3, 4, 4]
    assert shelf.repeat(2).memory.flatten().tolist() == [0, 0, 1, 1]
    assert padded([[1, 2], [], [3]]).tolist() == [[1, 2], [-1, -1], [3, -1]]
    assert padded([]).shape == (0, 0)


def test_each_baseline_prefers_what_its_name_says() -> None:
    """A row of five; object 4 is the target, 1 looks like it."""
    shapes = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1, 0.9], [0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]])
    crops = shapes.view(1, 5, 1, 2, 2) * 3 + 7  # correlation knows no brightness or contrast
    target, cells = torch.tensor([4]), grid_cells(1, 5)
    path = torch.tensor([[2, 1, 4]])

    def scores(baseline: object) -> Tensor:
        return baseline.scores(baseline.encode(crops, target, cells), path)[0]  # pyright: ignore[reportAttributeAccessIssue]

    uniform, nearest, similar = (scores(b) for b in (Uniform(), Nearest(), MostSimilar(2.0)))
    assert uniform[1].tolist() == [0, 0, NEVER, 0, 0, NEVER, NEVER]
    assert nearest[0, :5].tolist() == [-2, -1, 0, -1, -2]
    assert nearest[2].tolist() == [-1, NEVER, NEVER, -2, -3, NEVER, NEVER]
    assert similar[0, :5].argmax() == 4
    assert similar[0, 1] > 0.9 * similar[0, 4]
    assert similar[0, 4].item() == pytest.approx(2.0)
    for rows in (uniform, nearest, similar):
        assert rows[3].tolist() == [NEVER] * 5 + [0, NEVER]  # behind the target: END
    assert decode(MostSimilar(), MostSimilar().encode(crops, target, cells)) == [[4]]


def test_a_shelf_that_was_seen_whole_ends_and_missing_cells_are_named() -> None:
    crops, target = torch.rand(1, 2, 3, 4, 4), torch.tensor([1])
    scores = Uniform().scores(Uniform().encode(crops, target, grid_cells(1, 2)), torch.tensor([[1, 0]]))
    assert scores[0, 2].argmax() == 2
    for baseline in BASELINES.values():
        with pytest.raises(ValueError, match=f"{type(baseline).__name__}: needs cells"):
            baseline.encode(crops, target)
