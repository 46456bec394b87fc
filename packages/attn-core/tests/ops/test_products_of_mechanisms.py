"""Every softmax operator and composite where mechanisms meet, against definitions in float64 that no backend shares."""

import pytest
import torch

import attn_core.composites
from attn_core.dispatch import Backend
from attn_core.testing import DEFINITIONS, Case, assert_matches_reference, errors, product_cases

COMPOSITES = [name for name in sorted(DEFINITIONS) if hasattr(attn_core.composites, name)]
OPERATORS = [name for name in sorted(DEFINITIONS) if name not in COMPOSITES]


def failures(cases: list[Case], dtype: torch.dtype, backends: tuple[Backend, ...]) -> list[str]:
    found = []
    for case in cases:
        for backend in backends:
            try:
                assert_matches_reference(case, dtype, backend, definition=DEFINITIONS[case.operator.__name__])
            except AssertionError as error:
                found.append(f"{backend}: {error}")
    return found


@pytest.mark.parametrize("name", [*OPERATORS, *COMPOSITES])
def test_reference_and_torch_give_the_definition_wherever_two_options_meet(name: str) -> None:
    assert failures(product_cases(name), torch.float64, ("reference", "torch")) == []


@pytest.mark.slow
def test_attention_gives_the_definition_wherever_three_options_meet() -> None:
    assert failures(product_cases("attention", strength=3), torch.float64, ("torch",)) == []


# A third of the cases, the rest among the slow tests.
@pytest.mark.parametrize("offset", [0, *(pytest.param(rest, marks=pytest.mark.slow) for rest in (1, 2))])
@pytest.mark.parametrize("name", OPERATORS)
def test_float32_gives_the_definition_wherever_options_meet(name: str, offset: int) -> None:
    assert failures(product_cases(name)[offset::3], torch.float32, ("torch",)) == []


# A sixth of the cases in each type, another sixth among the slow tests.
@pytest.mark.parametrize("part", [0, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("offset", "dtype"), [(1, torch.bfloat16), (2, torch.float16)], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_narrow_types_give_the_definition_wherever_options_meet(
    name: str, offset: int, dtype: torch.dtype, part: int
) -> None:
    assert failures(product_cases(name)[offset + part :: 6], dtype, ("torch",)) == []


@pytest.mark.parametrize("offset", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OPERATORS)
def test_sixteen_bits_lose_little_beside_the_reference_in_sixteen_bits(name: str, offset: int) -> None:
    definition, eps = DEFINITIONS[name], torch.finfo(torch.bfloat16).eps / 2
    lost = []
    for case in product_cases(name)[offset::4]:
        ours, theirs = (errors(case, torch.bfloat16, backend, "cpu", definition) for backend in ("torch", "reference"))
        # Rounding the results costs eps / 2 each; what else is rounded on the way may cost a few of them.
        for (part, error), (_, reference) in zip(ours, theirs, strict=True):
            if not error <= 4 * reference + 3 * eps:
                lost.append(f"{case}: {part} is off by {error:.1e}, the reference by {reference:.1e}")
    assert lost == []
