"""The Triton kernels of additive attention against the float64 reference, in the interpreter (tiles of 16 × 32)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_core import additive_attention
from attn_core.testing import Case, assert_matches_reference, cases_of, gradients, leaves, run

CASES = [case for case in cases_of("additive_attention") if "several tiles" not in case.name]


def guarded(x: Tensor) -> Tensor:
    """``x`` inside a buffer of NaN: what is read before, behind or beside it shows."""
    buffer = torch.full((x.shape[0], x.shape[1] + 2, x.shape[2] + 3), float("nan"), dtype=x.dtype)
    view = buffer[:, 1:-1, : x.shape[2]]
    return view.copy_(x).requires_grad_()


def large_case(name: str, queries: int, keys: int, width: int, value: int | None, mask: bool = False) -> Case:
    """Several tiles each way; NaN around every operand."""

    def build(dtype: torch.dtype, _device: str) -> tuple[list[Any], dict[str, Any]]:
        def data(*shape: int) -> Tensor:
            return guarded(torch.randn(shape, dtype=torch.float64).to(dtype))

        w = torch.randn(width, dtype=torch.float64).to(dtype).requires_grad_()
        args = [data(2, queries, width), data(2, keys, width), w]
        options = {"key_mask": torch.rand(2, keys) > 0.4} if mask else {}
        return [*args, data(2, keys, value)] if value else args, options

    return Case(additive_attention, name, build)


LARGE = [
    large_case("scores of several tiles", 19, 41, 5, None, mask=True),
    large_case("values of several tiles", 35, 37, 5, 20),
    large_case("masked values of several tiles", 17, 40, 3, 7, mask=True),
]


@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_float32_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float32, "triton")


@pytest.mark.parametrize("case", [c for c in CASES if c.varied], ids=str)
def test_float16_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float16, "triton")


@pytest.mark.parametrize("case", LARGE[:2], ids=str)
def test_two_runs_give_equal_bits(case: Case) -> None:
    runs = []
    for _ in range(2):
        args, kwargs = case.inputs(torch.float32)
        outputs = run(case, args, kwargs, "triton")
        runs.append([*outputs, *gradients(outputs, leaves(args, kwargs))])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_gradient_of_scores_alone_and_of_log_sum_exp_alone() -> None:
    q, k, w = (torch.randn(*shape, requires_grad=True) for shape in ((1, 5, 4), (1, 9, 4), (4,)))
    for output in range(2):
        expected = torch.autograd.grad(additive_attention(q, k, w, backend="reference")[output].sum(), (q, k, w))
        actual = torch.autograd.grad(additive_attention(q, k, w, backend="triton")[output].sum(), (q, k, w))
        for want, got in zip(expected, actual, strict=True):
            torch.testing.assert_close(got, want, atol=4e-5, rtol=0)


def test_a_value_too_wide_is_refused_with_the_reason() -> None:
    q, k, w = torch.zeros(1, 2, 4), torch.zeros(1, 3, 4), torch.zeros(4)
    with pytest.raises(RuntimeError, match="the kernel holds value widths up to 128 in float32, got 129"):
        additive_attention(q, k, w, torch.zeros(1, 3, 129), backend="triton")
