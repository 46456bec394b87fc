"""The one timing loop: turns, warm-up, memory and error beside time."""

import pytest
import torch

from attn_core.bench import in_turns


def test_functions_take_turns_after_one_untimed_call_each() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    in_turns(calls, rounds=3)
    assert order == ["a", "b"] * 4


def test_error_and_memory_stand_beside_the_time() -> None:
    x = torch.ones(1000)
    expected = [torch.full((1000,), 2.0, dtype=torch.float64)]
    found = in_turns({"right": lambda: x * 2, "off": lambda: x * 2.5}, rounds=2, memory=True, expected=expected)
    assert found["right"].error == 0.0
    assert found["off"].error == pytest.approx(0.25)
    for one in found.values():
        assert one.mem_mb is not None
        assert one.mem_mb >= 4000 / 2**20
        assert 0 < one.p20 <= one.ms <= one.p80


def test_threads_are_those_asked_for_and_given_back() -> None:
    before, seen = torch.get_num_threads(), []
    in_turns({"a": lambda: seen.append(torch.get_num_threads())}, rounds=1, threads=1)
    assert set(seen) == {1}
    assert torch.get_num_threads() == before


def test_a_short_function_is_called_many_times_in_a_row() -> None:
    calls = []
    in_turns({"a": lambda: calls.append(1)}, rounds=2, seconds=0.02)
    assert len(calls) > 20
