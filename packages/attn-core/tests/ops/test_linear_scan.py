"""linear_scan: properties over lengths and directions, narrow and wide steps, and every message."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_core import linear_scan
from attn_core.ops.linear_scan import recurrence
from attn_core.testing import relative_error


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gates(*shape: int, seed: int = 9) -> Tensor:
    return random(*shape, seed=seed).tanh()


@settings(deadline=None, max_examples=40)
@given(steps=st.integers(1, 300), reverse=st.booleans(), wide=st.booleans(), start=st.booleans())
def test_equals_the_recurrence(steps: int, reverse: bool, wide: bool, start: bool) -> None:
    a, b = gates(2, steps, 3), random(2, steps, 3)
    h0 = random(2, 3, seed=2) if start else None
    expected = linear_scan(a, b, h0, reverse=reverse, backend="reference")
    before, recurrence.WIDE_STEP = recurrence.WIDE_STEP, 1 if wide else recurrence.WIDE_STEP
    try:
        actual = linear_scan(a, b, h0, reverse=reverse)
    finally:
        recurrence.WIDE_STEP = before
    assert relative_error(actual, expected) <= 1e-10


@settings(deadline=None, max_examples=20)
@given(steps=st.integers(1, 100))
def test_reverse_is_the_scan_of_the_mirrored_sequence(steps: int) -> None:
    a, b, h0 = gates(1, steps, 4), random(1, steps, 4), random(1, 4, seed=3)
    mirrored = linear_scan(a.flip(1), b.flip(1), h0).flip(1)
    assert relative_error(linear_scan(a, b, h0, reverse=True), mirrored) <= 1e-12


@settings(deadline=None, max_examples=20)
@given(parts=st.lists(st.integers(1, 80), min_size=1, max_size=4))
def test_pieces_joined_by_their_last_state_equal_the_whole(parts: list[int]) -> None:
    a, b = gates(1, sum(parts), 3), random(1, sum(parts), 3)
    pieces, state = [], None
    for gate, term in zip(a.split(parts, 1), b.split(parts, 1), strict=True):
        pieces.append(linear_scan(gate, term, state))
        state = pieces[-1][:, -1]
    assert relative_error(torch.cat(pieces, 1), linear_scan(a, b)) <= 1e-10


@settings(deadline=None, max_examples=20)
@given(steps=st.integers(2, 120), cut=st.integers(0, 118))
def test_the_future_has_no_influence(steps: int, cut: int) -> None:
    cut = min(cut, steps - 2)
    a, b = gates(1, steps, 3), random(1, steps, 3)
    changed_a, changed_b = a.clone(), b.clone()
    changed_a[:, cut + 1 :] += 1
    changed_b[:, cut + 1 :] -= 3
    expected, actual = (linear_scan(*x)[:, : cut + 1] for x in ((a, b), (changed_a, changed_b)))
    assert relative_error(actual, expected) <= 1e-12


def test_gates_of_one_sum_and_of_zero_forget() -> None:
    b = random(1, 130, 2)
    assert relative_error(linear_scan(torch.ones(1, 130).double(), b), b.cumsum(1)) <= 1e-12
    assert torch.equal(linear_scan(torch.zeros(1, 130).double(), b), b)


def test_products_of_gates_that_underflow_give_no_nan() -> None:
    a = torch.full((1, 4096, 2), 1e-8, requires_grad=True)
    b = torch.randn(1, 4096, 2, requires_grad=True)
    h = linear_scan(a, b)
    grads = torch.autograd.grad(h.sum(), (a, b))
    assert all(bool(x.isfinite().all()) for x in (h, *grads))


def make(**replaced: object) -> dict[str, object]:
    return {"a": torch.zeros(2, 6, 3), "b": torch.zeros(2, 6, 3, 4), **replaced}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": torch.zeros(6)}, r"linear_scan: b must have at least 2 dimensions \(B T …\), got shape \(6,\)"),
        ({"b": torch.zeros(2, 6, 3, 4).long()}, "linear_scan: b must be one of float64"),
        (
            {"a": torch.zeros(6)},
            r"a must broadcast to b \(2, 6, 3, 4\) from the left, with as many steps, got a=\(6,\)",
        ),
        ({"a": torch.zeros(2, 1, 3)}, "a must broadcast to b .* from the left, with as many steps"),
        ({"a": torch.zeros(2, 6, 4)}, "a must broadcast to b"),
        ({"a": torch.zeros(2, 6, 3, 4, 1)}, "a must broadcast to b"),
        ({"a": torch.zeros(2, 6, 3).half()}, "a must be one of float32, got a.dtype=torch.float16"),
        ({"a": torch.zeros(2, 6, 3, device="meta")}, r"a must be on the device of b \(cpu\), got a on meta"),
        ({"h0": torch.zeros(2, 3)}, r"h0 must be of shape \(2, 3, 4\), b without its steps, got h0=\(2, 3\)"),
        ({"h0": torch.zeros(2, 3, 4).double()}, "h0 must be one of float32, got h0.dtype=torch.float64"),
        ({"h0": torch.zeros(2, 3, 4, device="meta")}, r"h0 must be on the device of b \(cpu\)"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_scan(**make(**changes))  # pyright: ignore[reportArgumentType]
