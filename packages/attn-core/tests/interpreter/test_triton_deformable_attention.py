"""The Triton kernels of deformable attention against the float64 reference, in the interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_core import deformable_attention
from attn_core.testing import Case, assert_matches_reference, cases_of, gradients, leaves, run

NAMES = ("plain", "one cell", "odd width", "most samples outside", "strided", "many queries", "depth", "depth, strided")
CASES = [case for case in cases_of("deformable_attention") if case.name in NAMES or case.name.startswith("no ")]


@pytest.fixture
def kernels_of_the_backward_pass() -> None:
    """Additions in any order are not deterministic: in that mode, which the suite sets, the torch backend runs."""
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("kernels_of_the_backward_pass")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float32, "triton")


@pytest.mark.usefixtures("kernels_of_the_backward_pass")
@pytest.mark.parametrize("case", [case for case in CASES if case.varied], ids=str)
def test_float16_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float16, "triton")


def test_deterministic_mode_gives_equal_bits_and_the_reference() -> None:
    case = CASES[0]
    assert_matches_reference(case, torch.float32, "triton")
    runs = []
    for _ in range(2):
        args, kwargs = case.inputs(torch.float32)
        outputs = run(case, args, kwargs, "triton")
        runs.append([*outputs, *gradients(outputs, leaves(args, kwargs))])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


@pytest.mark.usefixtures("kernels_of_the_backward_pass")
def test_nothing_is_read_beside_the_operands() -> None:
    def guarded(x: Tensor) -> Tensor:
        buffer = torch.full((x.shape[0], x.shape[1] + 2, x.shape[2], x.shape[3] + 3), float("nan"), dtype=x.dtype)
        return buffer[:, 1:-1, :, : x.shape[3]].copy_(x).requires_grad_()

    def build(dtype: torch.dtype, device: str) -> tuple[list[Any], dict[str, Any]]:
        args, _ = next(case for case in CASES if case.name == "depth").build(dtype, device)
        return [guarded(args[0].detach()), *args[1:4], guarded(args[4].detach())], {}

    assert_matches_reference(Case(deformable_attention, "guarded", build), torch.float32, "triton")
