"""What a remembered check takes for the same call, and what it does not."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_core import checks
from attn_core.checks import remembered


def counted() -> tuple[list[Any], Any]:
    calls: list[Any] = []

    @remembered
    def check(x: Any, option: Any = None) -> int:
        calls.append((x, option))
        return len(calls)

    return calls, check


def test_a_second_call_with_the_same_signature_costs_no_check() -> None:
    calls, check = counted()
    results = [check(torch.randn(2, 3), 1.0) for _ in range(3)]
    assert (len(calls), results) == (1, [1, 1, 1])


@pytest.mark.parametrize(
    "others",
    [
        (torch.zeros(3, 2), 1),
        (torch.zeros(2, 3, dtype=torch.float64), 1),
        (torch.zeros(2, 3, device="meta"), 1),
        (torch.zeros(2, 3), True),
        (torch.zeros(2, 3), 1.0),
        (torch.zeros(2, 3), None),
        (torch.zeros(2, 3), "1"),
        ((torch.zeros(2, 3),), 1),
    ],
    ids=["shape", "dtype", "device", "bool", "float", "none", "string", "tuple"],
)
def test_another_signature_is_checked_anew(others: tuple[Any, Any]) -> None:
    calls, check = counted()
    check(torch.zeros(2, 3), 1)
    check(*others)
    assert len(calls) == 2


def test_a_failed_check_fails_again() -> None:
    @remembered
    def check(x: Tensor) -> None:
        raise ValueError(f"got shape {tuple(x.shape)}")

    for _ in range(2):
        with pytest.raises(ValueError, match=r"got shape \(2,\)"):
            check(torch.zeros(2))


def test_subclasses_are_checked_each_time() -> None:
    class Marked(Tensor):
        pass

    calls, check = counted()
    for _ in range(2):
        check(torch.zeros(1).as_subclass(Marked))
    assert len(calls) == 2


def test_memory_does_not_grow_with_the_number_of_signatures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "MAX_REMEMBERED", 4)
    calls, check = counted()
    for n in range(9):
        check(torch.zeros(n))
    check(torch.zeros(8))  # the last is still known
    check(torch.zeros(0))  # the first is not
    assert len(calls) == 10
