"""Convex hulls, Delaunay triangulations and tours of batches of points in the plane: the teachers and the judges.

Everything is vectorized over the batch; the rare instances that are not in general position take a slower way.
Indices count from 0.
"""

import itertools
import math
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LARGEST_EXACT_TOUR = 13  # Held-Karp holds 2^(n−1)·(n−1) numbers for each instance
LARGEST_TRIANGLE_TEST = 10  # beyond, testing all triples costs more than scipy's sweep
_DEGENERATE = 1e-12


def checked_points(points: Tensor, caller: str, least: int) -> Float[Tensor, "B N 2"]:
    """``points`` in float64.

    Raises:
        ValueError: not (B, N, 2) with N ≥ ``least``, or coordinates that are not finite.
    """
    if points.ndim != 3 or points.shape[-1] != 2:
        raise ValueError(f"{caller}: points must be (B, N, 2), got {tuple(points.shape)}")
    if points.shape[1] < least:
        raise ValueError(f"{caller}: needs at least {least} point{'s' * (least > 1)}, got n={points.shape[1]}")
    points = points.double()
    if not bool(points.isfinite().all()):
        raise ValueError(f"{caller}: coordinates must be finite")
    return points


def convex_hulls(points: Float[Tensor, "B N 2"]) -> list[list[int]]:
    """Corners of the convex hulls, counter-clockwise from the corner of lowest index.

    A point on an edge is no corner; of equal points the first one stands for all. Points on a line give its two ends,
    equal points a single corner.

    Raises:
        ValueError: no points, wrong shape, coordinates that are not finite.
    """
    points = checked_points(points, "convex_hulls", 1)
    n = points.shape[1]
    if n < 3:
        return [_monotone_chain(row) for row in points.tolist()]
    hulls: list[list[int]] = []
    for part in points.split(max(1, 4_000_000 // n**3)):
        x, y = part.unbind(-1)
        dx, dy = x[:, None] - x[:, :, None], y[:, None] - y[:, :, None]  # [b, i, j] = from i to j
        side = dx[:, :, :, None] * dy[:, :, None] - dy[:, :, :, None] * dx[:, :, None]  # (b, i, j, k): k left of i→j
        i, j, k = (torch.arange(n).view(shape) for shape in ((n, 1, 1), (1, n, 1), (1, 1, n)))
        own = (k == i) | (k == j) | (i == j)
        edge = ((side > 0) | own).all(-1) & ~torch.eye(n, dtype=torch.bool)
        flat = (side.abs() <= _DEGENERATE) & ~own
        special = flat.flatten(1).any(1).tolist()
        following = edge.int().argmax(-1).tolist()
        corner = edge.any(-1)
        first = corner.int().argmax(-1).tolist()
        rows = part.tolist()
        for b, start in enumerate(first):
            if special[b]:
                hulls.append(_monotone_chain(rows[b]))
                continue
            hull, at = [start], following[b][start]
            while at != start:
                hull.append(at)
                at = following[b][at]
            hulls.append(hull)
    return hulls


def _monotone_chain(points: list[list[float]]) -> list[int]:
    """Andrew 1979, counter-clockwise, without points on edges; starts at the corner of lowest index."""
    order = sorted(range(len(points)), key=lambda index: (*points[index], index))
    order = order[:1] + [b for a, b in itertools.pairwise(order) if points[a] != points[b]]
    if len(order) < 3:
        chain = order
    else:
        chain = []
        for sweep in (order, order[::-1]):
            half: list[int] = []
            for index in sweep:
                while len(half) > 1 and _turn(points[half[-2]], points[half[-1]], points[index]) <= _DEGENERATE:
                    half.pop()
                half.append(index)
            chain += half[:-1]
    start = chain.index(min(chain))
    return chain[start:] + chain[:start]


def _turn(a: list[float], b: list[float], c: list[float]) -> float:
    return (b[0] - a[0]) * (c[1] - a[1]) - (b[1] - a[1]) * (c[0] - a[0])


def delaunay_triangles(points: Float[Tensor, "B N 2"]) -> list[list[tuple[int, int, int]]]:
    """Triangles of the Delaunay triangulations, in the order that Pointer Networks learn.

    The indices of a triangle rise; triangles are sorted by the coordinates of their incenters, first x, then y. Of
    four points on a circle one of the two triangulations is given; of equal points only one belongs to triangles.

    Raises:
        ValueError: fewer than 3 points, all points on a line, wrong shape, coordinates that are not finite.

    Source: Vinyals et al. 2015 (arXiv 1506.03134), section 3.2.
    """
    points = checked_points(points, "delaunay_triangles", 3)
    n = points.shape[1]
    if n > LARGEST_TRIANGLE_TEST:
        return [_sorted_triangles(row, _swept_triangles(row)) for row in points]
    triples = torch.tensor(list(itertools.combinations(range(n), 3)))
    results: list[list[tuple[int, int, int]]] = []
    for part in points.split(max(1, 4_000_000 // (len(triples) * n))):
        corner = part[:, triples]  # (b, S, 3, 2)
        a = corner[:, :, None] - part[:, None, :, None]  # (b, S, N, 3, 2): corners as seen from a point
        square = a.square().sum(-1)
        x, y = a.unbind(-1)
        minors = [
            (x[..., p] * y[..., q] - x[..., q] * y[..., p]) * square[..., r]
            for p, q, r in ((0, 1, 2), (1, 2, 0), (2, 0, 1))
        ]
        ab, ac = corner[:, :, 1] - corner[:, :, 0], corner[:, :, 2] - corner[:, :, 0]
        area = ab[..., 0] * ac[..., 1] - ab[..., 1] * ac[..., 0]
        inside = sum(minors) * area.sign()[..., None]  # positive inside the circle
        own = (triples[:, :, None] == torch.arange(n)).any(1)
        keep = ((inside <= 0) | own).all(-1) & (area != 0)
        special = (((inside.abs() <= _DEGENERATE) & ~own).any(-1) & keep).any(1) | (area.abs() <= _DEGENERATE).any(1)
        for row, chosen, unclear in zip(part, keep, special.tolist(), strict=True):
            found = torch.tensor(_swept_triangles(row)) if unclear else triples[chosen]
            results.append(_sorted_triangles(row, found.tolist()))
    return results


def _swept_triangles(points: Tensor) -> list[list[int]]:
    from scipy.spatial import Delaunay, QhullError

    try:
        return np.sort(Delaunay(points.numpy()).simplices, axis=1).tolist()
    except QhullError:
        raise ValueError(
            f"delaunay_triangles: the {len(points)} points are on a line or equal, they have no triangulation"
        ) from None


def _sorted_triangles(points: Tensor, triangles: list[list[int]]) -> list[tuple[int, int, int]]:
    corner = points[torch.tensor(triangles)]  # (S, 3, 2)
    weight = (corner[:, [1, 2, 0]] - corner[:, [2, 0, 1]]).norm(dim=-1)  # of a corner: length of the side opposite
    center = (weight[..., None] * corner).sum(1) / weight.sum(1, keepdim=True)
    order = sorted(range(len(triangles)), key=lambda index: center[index].tolist())
    return [(triangles[i][0], triangles[i][1], triangles[i][2]) for i in order]


def tour_lengths(points: Float[Tensor, "B N 2"], tours: Int[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """Lengths of closed tours, the way back to the start included."""
    visited = points.gather(1, tours[..., None].expand(-1, -1, 2))
    return (visited - visited.roll(-1, 1)).norm(dim=-1).sum(1)


def optimal_tours(points: Float[Tensor, "B N 2"]) -> Int[Tensor, "B N"]:
    """Shortest tours by dynamic programming, from the first city; the second city has a lower index than the last.

    O(2ⁿ·n²) operations and O(2ⁿ·n) numbers for each instance.

    Raises:
        ValueError: no points, more than 13, wrong shape, coordinates that are not finite.

    Source: Held and Karp 1962.
    """
    points = checked_points(points, "optimal_tours", 1)
    n = points.shape[1]
    if n > LARGEST_EXACT_TOUR:
        raise ValueError(f"optimal_tours: exact up to n={LARGEST_EXACT_TOUR}, got n={n}; use two_opt_tours")
    if n < 4:
        return torch.arange(n).expand(points.shape[0], n).clone()
    part = max(1, 4_000_000 // (2 ** (n - 1) * n))
    return torch.cat([_held_karp(some) for some in points.split(part)])


def _held_karp(points: Tensor) -> Tensor:
    batch, n = points.shape[:2]
    others = n - 1
    distance = (points[:, :, None] - points[:, None]).norm(dim=-1).permute(1, 2, 0)  # (N, N, B)
    between = distance[1:, 1:]
    best = torch.full((2**others, others, batch), math.inf, dtype=points.dtype)  # of paths 0 → set, by their last city
    before = torch.zeros((2**others, others, batch), dtype=torch.int8)
    for city in range(others):
        best[1 << city, city] = distance[0, 1 + city]
    for size in range(2, others + 1):
        members = torch.tensor(list(itertools.combinations(range(others), size)))  # (S, size)
        sets = (1 << members).sum(1)
        without = sets[:, None] - (1 << members)
        reached = best[without] + between[:, members].permute(1, 2, 0, 3)  # (S, size, previous, B)
        shortest, previous = reached.min(2)
        best[sets[:, None], members] = shortest
        before[sets[:, None], members] = previous.to(torch.int8)
    rows = torch.arange(batch)
    last = (best[-1] + distance[1:, 0]).argmin(0)
    tour = torch.zeros(batch, n, dtype=torch.long)
    visited = torch.full((batch,), 2**others - 1)
    for place in range(n - 1, 0, -1):
        tour[:, place] = last + 1
        previous = before[visited, last, rows].long()
        visited = visited - (1 << last)
        last = previous
    return canonical_tours(tour)


def canonical_tours(tours: Int[Tensor, "B N"]) -> Int[Tensor, "B N"]:
    """The same closed tours from city 0, in the direction whose second city has a lower index than the last."""
    n = tours.shape[1]
    place = (tours.argmin(1, keepdim=True) + torch.arange(n)) % n
    tours = tours.gather(1, place)
    back = torch.cat([tours[:, :1], tours[:, 1:].flip(1)], dim=1)
    return torch.where((tours[:, 1] > tours[:, -1])[:, None], back, tours) if n > 2 else tours


def nearest_neighbor_tours(points: Float[Tensor, "B N 2"]) -> Int[Tensor, "B N"]:
    """From the first city always to the nearest one that is left; O(n²)."""
    points = checked_points(points, "nearest_neighbor_tours", 1)
    batch, n = points.shape[:2]
    rows = torch.arange(batch)
    tour = torch.zeros(batch, n, dtype=torch.long)
    left = torch.ones(batch, n, dtype=torch.bool)
    left[:, 0] = False
    for place in range(1, n):
        distance = (points - points[rows, tour[:, place - 1]][:, None]).norm(dim=-1)
        tour[:, place] = distance.masked_fill(~left, math.inf).argmin(1)
        left[rows, tour[:, place]] = False
    return tour


def two_opt_tours(points: Float[Tensor, "B N 2"]) -> Int[Tensor, "B N"]:
    """Nearest-neighbor tours in which no exchange of two edges gains anything, best exchange first.

    Source: Croes 1958.
    """
    points = checked_points(points, "two_opt_tours", 1)
    tours = nearest_neighbor_tours(points)
    n = points.shape[1]
    if n < 4:
        return canonical_tours(tours)
    for row, tour in enumerate(tours):
        distance = (points[row, :, None] - points[row, None]).norm(dim=-1)
        while True:
            following = tour.roll(-1)
            edge = distance[tour, following]
            # Exchange of the edges behind places i and j: i–j and i⁺–j⁺ instead of i–i⁺ and j–j⁺.
            change = distance[tour][:, tour] + distance[following][:, following] - edge[:, None] - edge
            change = change.triu(1)
            gain, where = change.flatten().min(0)
            if gain > -1e-12:
                break
            i, j = divmod(int(where), n)
            tour[i + 1 : j + 1] = tour[i + 1 : j + 1].flip(0)
        tours[row] = tour
    return canonical_tours(tours)


def polygon_area(points: Float[Tensor, "K 2"]) -> float:
    """Area of a polygon, positive if it runs counter-clockwise."""
    x, y = points.double().unbind(-1)
    return float((x * y.roll(-1) - y * x.roll(-1)).sum() / 2)


def is_simple_polygon(points: Float[Tensor, "K 2"]) -> bool:
    """Whether at least three corners are joined without a crossing and without a corner twice."""
    corners = points.double().tolist()
    count = len(corners)
    if count < 3 or len({tuple(corner) for corner in corners}) < count:
        return False
    edges = [(corners[i], corners[(i + 1) % count]) for i in range(count)]
    for i, j in itertools.combinations(range(count), 2):
        if j - i in (1, count - 1):
            continue
        (a, b), (c, d) = edges[i], edges[j]
        if _turn(a, b, c) * _turn(a, b, d) <= 0 and _turn(c, d, a) * _turn(c, d, b) <= 0:
            return False
    return True


def symmetric(points: Float[Tensor, "B N 2"], which: Int[Tensor, " B"]) -> Float[Tensor, "B N 2"]:
    """Images of points of the unit square under its 8 symmetries; ``which`` counts from 0 to 7.

    Odd numbers of bits reverse directions: 1 mirrors x, 2 mirrors y, 4 exchanges x and y.
    """
    x, y = points.unbind(-1)
    x = torch.where((which & 1).bool()[:, None], 1 - x, x)
    y = torch.where((which & 2).bool()[:, None], 1 - y, y)
    exchange: Bool[Tensor, "B 1"] = (which & 4).bool()[:, None]
    return torch.stack([torch.where(exchange, y, x), torch.where(exchange, x, y)], dim=-1)


GeometryTask = Literal["hull", "delaunay", "tsp"]
