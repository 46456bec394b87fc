"""The Triton kernels of merge_attention against the float64 reference, in the interpreter (16 queries × 16 columns)."""

from typing import Any

import pytest
import torch

from attn_core import merge_attention
from attn_core.testing import Case, assert_matches_reference, cases_of, gradients, leaves, run


def large_case(name: str, parts: int, *, unlike: bool = False) -> Case:
    """Several tiles of queries and of columns; NaN around every part, and in a part without keys."""

    def build(dtype: torch.dtype, _device: str) -> tuple[list[Any], dict[str, Any]]:
        outs, lses = [], []
        for s in range(parts):
            token_major = unlike and s % 2 == 1
            shape = (2, 13, 3, 21) if token_major else (2, 3, 13, 21)
            buffer = torch.full((*shape[:3], 25), float("nan"), dtype=dtype)
            out = buffer[..., 2:-2].copy_(torch.randn(shape, dtype=torch.float64))
            lse = torch.randn(2, 3, 13) * 3
            lse[:, 1, s::2] = -torch.inf
            out = out.transpose(1, 2) if token_major else out
            out.masked_fill_(lse.isneginf()[..., None], float("nan"))
            outs.append(out.detach().requires_grad_())
            lses.append(lse.requires_grad_())
        return [outs, lses], {}

    return Case(merge_attention, name, build)


LARGE = [
    large_case("eight parts and several tiles", 8),
    large_case("more parts than one kernel reads", 19),
    large_case("parts with strides of their own", 3, unlike=True),
]


@pytest.mark.parametrize("case", [*cases_of("merge_attention"), *LARGE], ids=str)
def test_float32_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float32, "triton")


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_float16_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float16, "triton")


def test_two_runs_give_equal_bits() -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        args, kwargs = LARGE[1].inputs(torch.float32)
        outputs = run(LARGE[1], args, kwargs, "triton")
        runs.append([t.nan_to_num() for t in (*outputs, *gradients(outputs, leaves(args, kwargs)))])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
