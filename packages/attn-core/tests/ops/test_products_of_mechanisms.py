"""Every softmax operator where its mechanisms meet, against definitions in float64 that no backend shares."""

import pytest
import torch

from attn_core.testing import DEFINITIONS, Case, assert_matches_reference, product_cases


def failures(cases: list[Case], dtype: torch.dtype, backends: tuple[str, ...]) -> list[str]:
    found = []
    for case in cases:
        for backend in backends:
            try:
                assert_matches_reference(case, dtype, backend, definition=DEFINITIONS[case.operator.__name__])
            except AssertionError as error:
                found.append(f"{backend}: {error}")
    return found


@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_reference_and_torch_give_the_definition_wherever_two_options_meet(name: str) -> None:
    assert failures(product_cases(name), torch.float64, ("reference", "torch")) == []


def test_attention_gives_the_definition_wherever_three_options_meet() -> None:
    assert failures(product_cases("attention", strength=3), torch.float64, ("torch",)) == []


@pytest.mark.parametrize(("part", "dtype"), [(0, torch.float32), (1, torch.bfloat16), (2, torch.float16)], ids=str)
@pytest.mark.parametrize("name", sorted(DEFINITIONS))
def test_narrow_types_give_the_definition_wherever_options_meet(name: str, part: int, dtype: torch.dtype) -> None:
    cases = product_cases(name)
    assert failures(cases if dtype == torch.float32 else cases[part::3], dtype, ("torch",)) == []
