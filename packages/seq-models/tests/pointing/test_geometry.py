"""Hulls, triangulations and tours against scipy and enumeration; conventions of the data; scores; degenerate points."""

import itertools
from typing import Any

import pytest
import torch
from scipy.spatial import ConvexHull, Delaunay

from seq_models.data import PointBatches, only_item
from seq_models.data.geometry import answers
from seq_models.pointing.geometry import (
    GeometryTask,
    convex_hulls,
    delaunay_triangles,
    is_simple_polygon,
    nearest_neighbor_tours,
    optimal_tours,
    polygon_area,
    tour_lengths,
    two_opt_tours,
)
from seq_models.pointing.metrics import DelaunayScore, HullScore, TourScore, same_cycle


def cloud(count: int, n: int) -> torch.Tensor:
    return torch.rand(count, n, 2, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


@pytest.mark.parametrize("n", [3, 5, 12])
def test_hulls_and_triangulations_equal_scipy_s(n: int) -> None:
    points = cloud(300, n)
    for row, hull, triangles in zip(points, convex_hulls(points), delaunay_triangles(points), strict=True):
        corners = ConvexHull(row.numpy()).vertices.tolist()
        first = corners.index(min(corners))
        assert hull == corners[first:] + corners[:first]
        assert {frozenset(t) for t in triangles} == {frozenset(t) for t in Delaunay(row.numpy()).simplices.tolist()}


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7])
def test_tours_are_the_shortest_of_all_permutations(n: int) -> None:
    points = cloud(10, n)
    found = tour_lengths(points, optimal_tours(points))
    orders = torch.tensor([[0, *rest] for rest in itertools.permutations(range(1, n))])
    lengths = torch.stack([tour_lengths(points, order.expand(10, -1)) for order in orders])
    assert (found - lengths.amin(0)).abs().max() < 1e-12
    two_opt, nearest = (tour_lengths(points, solve(points)) for solve in (two_opt_tours, nearest_neighbor_tours))
    assert bool((found <= two_opt + 1e-12).all())
    assert bool((two_opt <= nearest + 1e-12).all())


def test_mean_shortest_tour_of_five_cities_is_the_paper_s() -> None:
    points = cloud(4000, 5)
    assert abs(float(tour_lengths(points, optimal_tours(points)).mean()) - 2.12) < 0.02


@pytest.mark.parametrize("task", ["hull", "delaunay", "tsp"])
def test_instances_from_the_pool_carry_the_answers_of_the_solver(task: GeometryTask) -> None:
    item = PointBatches(task, 6, length=1, batch=64, solved_ahead=50)[0]
    expected = answers(task, item["points"])
    steps = min(expected.shape[1], item["pointers"].shape[1])
    assert torch.equal(item["pointers"][:, :steps], expected[:, :steps])
    assert not item["pointers"][:, steps:].any()


def test_answers_keep_the_paper_s_orders() -> None:
    points = cloud(50, 6)
    for row, pointers in zip(points, answers("hull", points).tolist(), strict=True):
        hull = pointers[: pointers.index(0)]
        assert hull[0] == min(hull)
        assert polygon_area(row[torch.tensor(hull) - 1]) > 0
    for row, triangles in zip(points, delaunay_triangles(points), strict=True):
        assert all(tuple(sorted(t)) == t for t in triangles)
        corner = row[torch.tensor(triangles)]
        side = (corner[:, [1, 2, 0]] - corner[:, [2, 0, 1]]).norm(dim=-1)
        x = (side * corner[..., 0]).sum(1) / side.sum(1)
        assert bool((x.diff() > 0).all())
    tours = answers("tsp", points)
    assert bool((tours[:, 0] == 1).all())
    assert bool((tours[:, 1] < tours[:, -1]).all())


def test_points_on_a_line_and_equal_points_have_documented_answers() -> None:
    line = torch.tensor([[[0.5, 0.5], [0.0, 0.0], [1.0, 1.0], [0.2, 0.2]]])
    assert convex_hulls(line) == [[1, 2]]
    assert convex_hulls(torch.full((1, 4, 2), 0.3)) == [[0]]
    square = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0], [0.0, 0.0], [0.5, 0.0]]])
    assert convex_hulls(square) == [[0, 1, 2, 3]]
    assert len(delaunay_triangles(square[:, :4])[0]) == 2
    with pytest.raises(ValueError, match="the 4 points are on a line or equal"):
        delaunay_triangles(line)
    assert float(tour_lengths(line, optimal_tours(line))) == pytest.approx(2 * 2**0.5)


def test_unusable_points_are_named() -> None:
    empty, flat = torch.zeros(1, 0, 2), torch.zeros(4, 2)
    for call, words in [
        (lambda: convex_hulls(empty), "convex_hulls: needs at least 1 point, got n=0"),
        (lambda: optimal_tours(empty), "optimal_tours: needs at least 1 point, got n=0"),
        (lambda: delaunay_triangles(torch.zeros(1, 2, 2)), "needs at least 3 points, got n=2"),
        (lambda: convex_hulls(flat), r"points must be \(B, N, 2\), got \(4, 2\)"),
        (lambda: convex_hulls(torch.full((1, 4, 2), torch.nan)), "coordinates must be finite"),
        (lambda: optimal_tours(torch.rand(1, 14, 2)), "exact up to n=13, got n=14; use two_opt_tours"),
    ]:
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "knapsack", "n": 5}, "task must be 'hull', 'delaunay' or 'tsp'"),
        ({"task": "hull", "n": 0}, "hull needs at least 3 points, got n=0"),
        ({"task": "tsp", "n": 5, "split": "dev"}, "split must be"),
        ({"task": "tsp", "n": 5, "batch": 0}, "batch must be at least 1"),
        ({"task": "tsp", "n": 5, "solver": "lkh"}, "solver must be 'exact' or '2-opt'"),
    ],
)
def test_data_that_cannot_be_made_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PointBatches(**options)


def test_two_items_are_not_one_batch() -> None:
    with pytest.raises(ValueError, match="use batch_size=1 in the data loader, got 2"):
        only_item([{}, {}])


def test_hull_score_ignores_rotation_but_not_direction() -> None:
    assert same_cycle([2, 3, 1], [1, 2, 3])
    assert not same_cycle([3, 2, 1], [1, 2, 3])
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    metric = HullScore()
    metric.process(None, [{"points": points, "pointers": p, "truth": [1, 2, 3, 4]} for p in ([3, 4, 1, 2], [1, 2, 3])])
    assert metric.compute_metrics(metric.results) == {"exact": 0.5, "area": 0.75, "invalid": 0.0}
    metric.process(None, [{"points": points, "pointers": [1, 3, 2, 4], "truth": [1, 2, 3, 4]}])
    scores = metric.compute_metrics(metric.results)
    assert scores["area"] != scores["area"]  # the paper's failure: too many answers are no polygons
    assert not is_simple_polygon(points[[0, 2, 1, 3]])


def test_delaunay_score_ignores_the_order_of_triangles_and_corners() -> None:
    metric, truth = DelaunayScore(), [1, 2, 3, 2, 3, 4]
    metric.process(None, [{"pointers": p, "truth": truth} for p in ([4, 3, 2, 3, 1, 2], [1, 2, 3, 1, 2, 4], [1, 2])])
    assert metric.compute_metrics(metric.results) == {"exact": 1 / 3, "triangles": 0.5}


def test_tour_score_leaves_out_answers_that_are_no_tours() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    metric = TourScore()
    tours = ([1, 2, 3, 4], [1, 2, 2, 4])
    metric.process(None, [{"points": points, "pointers": p, "truth": [1, 2, 3, 4]} for p in tours])
    assert metric.compute_metrics(metric.results) == {
        "ratio": 1.0,
        "length": 4.0,
        "teacher_length": 4.0,
        "invalid": 0.5,
    }
