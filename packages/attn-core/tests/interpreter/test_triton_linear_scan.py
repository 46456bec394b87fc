"""The Triton kernel of linear_scan against the float64 reference, in the interpreter (tiles of 32 steps)."""

from typing import Any

import pytest
import torch

from attn_core import linear_scan
from attn_core.testing import Case, assert_matches_reference, cases_of

CASES = cases_of("linear_scan")


def wide_case(name: str, gates: tuple[int, ...], features: tuple[int, ...], **options: Any) -> Case:
    """More features than one tile holds, gates between others in memory, NaN around them."""

    def build(dtype: torch.dtype, _device: str) -> tuple[list[Any], dict[str, Any]]:
        buffer = torch.full((2, 41, *gates[:-1], gates[-1] + 3), float("nan"))
        a = buffer[:, 1:, ..., : gates[-1]]
        a.copy_(torch.rand(a.shape))
        b = torch.randn(2, 40, *features, dtype=torch.float64).to(dtype)
        return [a.requires_grad_(), b.requires_grad_(), torch.randn(2, *features).requires_grad_()], options

    return Case(linear_scan, name, build)


WIDE = [
    wide_case("own gates", (70,), (70,)),
    wide_case("shared gates", (2,), (2, 70), reverse=True),
]


@pytest.mark.parametrize("case", [*CASES, *WIDE], ids=str)
def test_float32_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float32, "triton")


@pytest.mark.parametrize("case", [CASES[1], CASES[2], *WIDE], ids=str)
def test_float16_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float16, "triton")
