"""The losses of BMN beside plain loops over pairs, and where the published ones are not finite."""

import math
from typing import Any

import torch

from detection.losses.boundary_matching import bmn_loss, regression_loss

VALID = torch.ones(4, 4, dtype=torch.float64).triu()


def inputs() -> Any:
    torch.manual_seed(0)
    pairs, start, end = (torch.rand(*shape, dtype=torch.float64) for shape in ((3, 2, 4, 4), (3, 4), (3, 4)))
    overlaps = torch.rand(3, 4, 4, dtype=torch.float64)
    overlaps[0, 0, :3] = torch.tensor([0.95, 0.8, 0.3])
    return pairs, start, end, overlaps, torch.rand(3, 4), torch.rand(3, 4)


def entropy(scores: list[float], positive: list[bool]) -> float:
    """Weighted so that positives and negatives count alike, as the papers write it."""
    count, few = len(scores), sum(positive)
    ratio = count / few
    terms = [
        0.5 * ratio * math.log(s + 1e-6) if p else 0.5 * ratio / (ratio - 1) * math.log(1 - s + 1e-6)
        for s, p in zip(scores, positive, strict=True)
    ]
    return -sum(terms) / count


def test_each_part_equals_a_loop_over_its_terms() -> None:
    pairs, start, end, overlaps, starts, ends = inputs()
    draws = torch.rand(2, 3, 4, 4, dtype=torch.float64)
    found = bmn_loss(pairs, start, end, overlaps, starts, ends, VALID, draws)
    expected = sum(
        entropy(s.flatten().tolist(), (t > 0.5).flatten().tolist()) for s, t in ((start, starts), (end, ends))
    )
    assert math.isclose(found["loss_boundary"].item(), expected, rel_tol=1e-6)
    places = [(b, i, j) for b in range(3) for i in range(4) for j in range(i, 4)]
    shares = {place: overlaps[place].item() for place in places}
    scores = [pairs[b, 1, i, j].item() for b, i, j in places]
    expected = entropy(scores, [share > 0.9 for share in shares.values()])
    assert math.isclose(found["loss_class"].item(), expected, rel_tol=1e-9)
    high = [p for p, share in shares.items() if share > 0.7]
    middle = [p for p, share in shares.items() if 0.3 < share <= 0.7]
    low = [p for p, share in shares.items() if 0 < share <= 0.3]
    chosen = list(high)
    for group, draw in ((middle, draws[0]), (low, draws[1])):
        chosen += [p for p in group if draw[p].item() > 1 - len(high) / len(group)]
    assert len(high) < len(chosen) < len(places)
    errors = [(pairs[b, 0, i, j].item() - shares[b, i, j]) ** 2 for b, i, j in chosen]
    assert math.isclose(found["loss_regression"].item(), 10 * 0.5 * sum(errors) / len(errors), rel_tol=1e-9)


def test_what_cannot_be_changes_nothing() -> None:
    pairs, start, end, overlaps, starts, ends = inputs()
    draws = torch.rand(2, 3, 4, 4)
    other = pairs * VALID + torch.rand_like(pairs) * (1 - VALID)
    one, two = (bmn_loss(each, start, end, overlaps, starts, ends, VALID, draws) for each in (pairs, other))
    torch.testing.assert_close(one, two, rtol=1e-12, atol=0)
    still = pairs.clone().requires_grad_()
    sum(bmn_loss(still, start, end, overlaps, starts, ends, VALID, draws).values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert still.grad is not None
    assert (still.grad * (1 - VALID)).abs().max() == 0


def test_videos_without_events_and_those_that_are_all_event_have_finite_losses() -> None:
    pairs, start, end, *_ = inputs()
    for level in (0.0, 1.0):
        wanted = torch.full((3, 4, 4), level), torch.full((3, 4), level), torch.full((3, 4), level)
        found = bmn_loss(pairs, start, end, wanted[0], wanted[1], wanted[2], VALID)
        assert all(value.isfinite() and value >= 0 for value in found.values())
        assert found["loss_boundary"] > 0
    assert bmn_loss(pairs[:0], start[:0], end[:0], pairs[:0, 0], start[:0], end[:0], VALID)["loss_class"] == 0


def test_about_as_many_middle_and_low_pairs_are_drawn_as_there_are_high_ones() -> None:
    overlaps = torch.zeros(1, 50, 50)
    overlaps[0, 0, :20], overlaps[0, 1, :40], overlaps[0, 2:, :] = 0.8, 0.5, 0.2
    torch.manual_seed(0)
    valid, scores = torch.ones(50, 50), torch.zeros(1, 50, 50)
    counts = [regression_loss(scores, overlaps, valid, torch.rand(2, 1, 50, 50)).item() for _ in range(50)]
    share = sum(0.5 * (20 * 0.64 + 20 * 0.25 + 20 * 0.04) / 60 for _ in range(50)) / 50
    assert math.isclose(sum(counts) / 50, share, rel_tol=0.05)


def test_half_precision_is_reckoned_in_float32() -> None:
    pairs, start, end, overlaps, starts, ends = inputs()
    draws = torch.rand(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        found = bmn_loss(pairs.bfloat16(), start.bfloat16(), end.bfloat16(), overlaps, starts, ends, VALID, draws)
    wide = bmn_loss(pairs, start, end, overlaps, starts, ends, VALID, draws)
    for name, value in found.items():
        torch.testing.assert_close(value.double(), wide[name], rtol=2e-2, atol=2e-2)
