"""The Triton kernels of selective_scan against the float64 reference, in the interpreter (tiles of 16 steps)."""

import pytest
import torch

from attn_core.testing import Case, assert_matches_reference, cases_of, gradients, leaves, run

CASES = cases_of("selective_scan")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float32, "triton")


@pytest.mark.parametrize("case", [case for case in CASES if "everything" in case.name], ids=str)
def test_float16_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float16, "triton")


@pytest.mark.parametrize("case", [case for case in CASES if "two chunks" in case.name], ids=str)
def test_two_runs_give_equal_bits(case: Case) -> None:
    runs = []
    for _ in range(2):
        args, kwargs = case.inputs(torch.float32)
        outputs = run(case, args, kwargs, "triton")
        runs.append([*outputs, *gradients(outputs, leaves(args, kwargs))])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
