"""Planar problems of Pointer Networks: points in the unit square and the sequence of pointers that answers them.

An item is a whole batch: generating, solving and shuffling 128 instances costs little more than one. Give the data
loader ``batch_size=1`` and ``collate_fn=only_item``.
"""

from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.data import Dataset

from seq_models.pointing.geometry import (
    GeometryTask,
    canonical_tours,
    convex_hulls,
    delaunay_triangles,
    optimal_tours,
    symmetric,
    two_opt_tours,
)

SEEDS = {"val": 1, "test": 2}
SOLVED_AHEAD = 65_536


class PointBatches(Dataset[dict[str, Tensor]]):
    """Batches of instances with ``n`` uniform points each.

    Pointers count from 1; 0 says that the sequence has ended and fills the rest. Orders are the paper's: hulls
    counter-clockwise from the corner of lowest index; Delaunay triangles with rising indices, sorted by incenters;
    tours from the first city (in the direction whose second city has a lower index than the last; no end).

    Training instances come from a pool that is solved ahead, each time under a random renumbering and a random symmetry
    of the square; with ``solved_ahead=0`` all are new and solved on the way.

    Args:
        split: ``"val"`` and ``"test"`` are fixed; ``"train"`` depends on epoch and index only.
        n: points, at least 3 (2 for tours).
        length: batches.
        batch: instances of a batch.
        solver: of tours: exact (n ≤ 13), or nearest neighbors improved by 2-opt.
        solved_ahead: training instances that are solved when the data set is made.

    Shapes: points (batch, n, 2) float32 in [0, 1]; pointers (batch, T) int64, T the longest of the batch.
    Raises: ValueError if an argument is out of range.
    Source: Vinyals et al. 2015 (arXiv 1506.03134), section 3.
    """

    def __init__(
        self,
        task: GeometryTask,
        n: int,
        split: Literal["train", "val", "test"] = "train",
        *,
        length: int = 1000,
        batch: int = 128,
        solver: Literal["exact", "2-opt"] = "exact",
        solved_ahead: int = SOLVED_AHEAD,
    ) -> None:
        least = 2 if task == "tsp" else 3
        if task not in ("hull", "delaunay", "tsp"):
            raise ValueError(f"PointBatches: task must be 'hull', 'delaunay' or 'tsp', got task={task!r}")
        if split not in ("train", "val", "test"):
            raise ValueError(f"PointBatches: split must be 'train', 'val' or 'test', got split={split!r}")
        if n < least:
            raise ValueError(f"PointBatches: {task} needs at least {least} points, got n={n}")
        for name, value, low in (("length", length, 1), ("batch", batch, 1), ("solved_ahead", solved_ahead, 0)):
            if value < low:
                raise ValueError(f"PointBatches: {name} must be at least {low}, got {name}={value}")
        if solver not in ("exact", "2-opt"):
            raise ValueError(f"PointBatches: solver must be 'exact' or '2-opt', got solver={solver!r}")
        self.task: GeometryTask = task
        self.n = n
        self.split = split
        self.length = length
        self.batch = batch
        self.solver = solver
        self.metainfo: dict[str, Any] = {"task": task, "n": n}
        self.pool: tuple[Tensor, Tensor] | None = None
        if split == "train" and solved_ahead:
            generator = torch.Generator().manual_seed(n)
            points = torch.rand(solved_ahead, n, 2, generator=generator)
            self.pool = points, answers(task, points, solver)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        if self.pool is not None:
            return dict(zip(("points", "pointers"), self._renumbered(*self.pool), strict=True))
        generator = None
        if self.split != "train":
            generator = torch.Generator().manual_seed(1_000_000 * SEEDS[self.split] + index)
        points = torch.rand(self.batch, self.n, 2, generator=generator)
        return {"points": points, "pointers": answers(self.task, points, self.solver)}  # pyright: ignore[reportArgumentType]

    def _renumbered(self, points: Tensor, pointers: Tensor) -> tuple[Tensor, Tensor]:
        chosen = torch.randint(len(points), (self.batch,))
        points, pointers = points[chosen], pointers[chosen]
        order = torch.rand(self.batch, self.n).argsort(1)  # new place p holds old point order[p]
        which = torch.randint(8, (self.batch,))
        points = symmetric(points.gather(1, order[..., None].expand(-1, -1, 2)), which)
        renamed = torch.cat([torch.zeros(self.batch, 1, dtype=torch.long), order.argsort(1) + 1], dim=1)
        pointers = renamed.gather(1, pointers)
        if self.task == "tsp":
            return points, canonical_tours(pointers - 1) + 1
        if self.task == "delaunay":
            return points, _by_incenter(points, pointers)
        mirrored = ((which & 1) + (which >> 1 & 1) + (which >> 2 & 1)) % 2 == 1
        return points, _from_lowest(pointers, mirrored)


def _from_lowest(pointers: Int[Tensor, "B T"], backwards: Tensor) -> Int[Tensor, "B T"]:
    """Cycles that end with zeros, turned to start at their lowest number, some of them in the other direction."""
    step = torch.arange(pointers.shape[1])
    count = (pointers > 0).sum(1, keepdim=True)
    start = pointers.where(pointers > 0, pointers.new_tensor(1 << 30)).argmin(1, keepdim=True)
    sign = torch.where(backwards, -1, 1)[:, None]
    turned = pointers.gather(1, (start + sign * step) % count)
    return turned * (step < count)


def _by_incenter(points: Float[Tensor, "B N 2"], pointers: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    """Triangles that end with zeros, brought into the order that is learned."""
    triangles = pointers[:, :-1].unflatten(1, (-1, 3)).sort(-1).values
    place = (triangles - 1).clamp_min(0).flatten(1)[..., None].expand(-1, -1, 2)
    corner = points.gather(1, place).unflatten(1, (-1, 3))
    weight = (corner[:, :, [1, 2, 0]] - corner[:, :, [2, 0, 1]]).norm(dim=-1)
    x = (weight * corner[..., 0]).sum(-1) / weight.sum(-1)
    order = x.masked_fill(triangles[..., 0] == 0, 2.0).argsort(1)
    triangles = triangles.gather(1, order[..., None].expand(-1, -1, 3))
    return torch.cat([triangles.flatten(1), pointers[:, -1:]], dim=1)


def answers(
    task: GeometryTask, points: Float[Tensor, "B N 2"], solver: Literal["exact", "2-opt"] = "exact"
) -> Int[Tensor, "B T"]:
    """Pointers that solve the instances: from 1, with zeros behind the end (at least one, but for tours)."""
    if task == "tsp":
        return (optimal_tours if solver == "exact" else two_opt_tours)(points) + 1
    if task == "hull":
        sequences = convex_hulls(points)
    else:
        sequences = [[index for triangle in row for index in triangle] for row in delaunay_triangles(points)]
    longest = max((len(sequence) for sequence in sequences), default=0) + 1
    return torch.tensor([[i + 1 for i in row] + [0] * (longest - len(row)) for row in sequences]).view(-1, longest)


def only_item(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The batch that an item already is.

    Raises:
        ValueError: if the loader's ``batch_size`` is not 1.
    """
    if len(items) != 1:
        raise ValueError(f"only_item: items are batches, use batch_size=1 in the data loader, got {len(items)}")
    return items[0]
