"""The Triton kernels of selective_scan against the float64 reference, in the interpreter (tiles of 16 steps)."""

import pytest
import torch

from attn_core import selective_scan
from attn_core.testing import Case, assert_matches_reference, cases_of, gradients, leaves, run

# Complex states are the torch backend's, which ``explain`` says.
CASES = [case for case in cases_of("selective_scan") if "conjugate pairs" not in case.name]


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


def test_softplus_keeps_the_digits_of_small_steps() -> None:
    # One step from a state of zero gives Δ itself, judged relatively: the largest would hide that the smallest is lost.
    delta = torch.linspace(-40, 40, 81).view(1, 81, 1).requires_grad_()
    u, ones = torch.ones(1, 81, 1), torch.ones(1, 1, 1, 1)
    out, _ = selective_scan(u, delta, -torch.ones(81, 1), ones, ones, delta_softplus=True, backend="triton")
    wide = delta.detach().double()
    torch.testing.assert_close(out.detach().double(), torch.logaddexp(wide, 0 * wide), rtol=1e-6, atol=0)
    (slope,) = torch.autograd.grad(out.sum(), delta)
    torch.testing.assert_close(slope.double(), wide.sigmoid(), rtol=1e-6, atol=0)
