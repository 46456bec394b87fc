"""The Triton kernels of unfused windows against the float64 reference, in the interpreter (boxes of 16 cells)."""

import pytest
import torch

from attn_core import neighborhood_scores, neighborhood_values
from attn_core.testing import Case, assert_matches_reference, cases_of, gradients, leaves, run

# What remains of ``cases_of`` differs in sizes alone; a program of the interpreter takes milliseconds.
NAMES = ("volume, causal axis", "dilation, relative bias", "causal, dilation", "zero, window larger than the grid")
NAMES += ("truncated, relative bias", "truncated, dilation", "no image")
CASES = [case for name in ("scores", "values") for case in cases_of(f"neighborhood_{name}") if case.name in NAMES]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float32, "triton")


@pytest.mark.parametrize("case", [case for case in CASES if case.name.startswith("truncated")], ids=str)
def test_float16_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float16, "triton")


def test_two_runs_give_equal_bits_of_every_gradient() -> None:
    case = next(case for case in CASES if case.name == "truncated, relative bias")
    runs = []
    for _ in range(2):
        args, kwargs = case.inputs(torch.float32)
        outputs = run(case, args, kwargs, "triton")
        runs.append([*outputs, *gradients(outputs, leaves(args, kwargs))])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_what_stands_in_empty_slots_is_never_read() -> None:
    p = torch.full((1, 1, 5, 3), float("nan"))
    p[:, :, 1:4], p[:, :, 0, 1:], p[:, :, 4, :2] = 1.0, 1.0, 1.0
    v = torch.arange(5.0).view(1, 1, 5, 1).requires_grad_()
    out = neighborhood_values(p.requires_grad_(), v, 3, border="truncated", backend="triton")
    assert out.flatten().tolist() == [1, 3, 6, 9, 7]
    dp, dv = torch.autograd.grad(out.sum(), (p, v))
    assert dv.flatten().tolist() == [2, 3, 3, 3, 2]
    assert not dp[0, 0, 0, 0]
    scores = neighborhood_scores(v, v, 3, border="zero", backend="triton")
    assert scores[0, 0, 0].tolist() == [0, 0, 0]
