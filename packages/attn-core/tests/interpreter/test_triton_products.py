"""The Triton kernels where the mechanisms of an operator meet, against the definitions, in the interpreter."""

from typing import Any

import pytest
import torch

from attn_core.testing import DEFINITIONS, Case, assert_matches_reference, every_case, product_cases, restrided

# A case takes about a second here: a sixth of them. Scatterbrain subtracts two large sums in float32, which no backend
# makes exact to 2e-5.
CASES = [case for name in sorted(DEFINITIONS) if name != "scatterbrain" for case in product_cases(name)[::6]]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_equals_the_definition(case: Case) -> None:
    assert_matches_reference(case, torch.float32, "triton", definition=DEFINITIONS[case.operator.__name__])


WITHOUT_KERNEL = {"linear"}  # torch's own product, which ``explain`` says
VARIED = {case.operator.__name__: case for case in every_case() if case.varied}


@pytest.mark.parametrize("name", sorted(VARIED.keys() - WITHOUT_KERNEL))
def test_any_strides_of_every_tensor_give_the_same(name: str) -> None:
    case = VARIED[name]

    def build(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
        args, kwargs = case.build(dtype, device)
        return [restrided(a) for a in args], {argument: restrided(a) for argument, a in kwargs.items()}

    assert_matches_reference(Case(case.operator, case.name, build), torch.float32, "triton")
