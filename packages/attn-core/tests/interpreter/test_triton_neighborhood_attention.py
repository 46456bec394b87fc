"""The Triton kernels of neighborhood attention against the float64 reference, in the interpreter."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_core import neighborhood_attention
from attn_core.testing import Case, assert_matches_reference, cases_of, gradients, leaves, run


def guarded(x: Tensor) -> Tensor:
    """``x`` inside a buffer of NaN, with columns behind: what is read there shows."""
    buffer = torch.full((*x.shape[:-1], x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    view = buffer[..., : x.shape[-1]]
    return view.copy_(x).requires_grad_()


def large_case(name: str, grid: tuple[int, ...], kernel: Any, rpb: bool = False, **options: Any) -> Case:
    """Several boxes along each axis; NaN behind every operand."""

    def build(dtype: torch.dtype, _device: str) -> tuple[list[Any], dict[str, Any]]:
        q, k, v = (guarded(torch.randn(1, 1, *grid, width, dtype=torch.float64).to(dtype)) for width in (20, 20, 12))
        sizes = (kernel,) * len(grid) if isinstance(kernel, int) else kernel
        bias = {"rpb": torch.randn(1, *(2 * n - 1 for n in sizes), dtype=torch.float64).to(dtype).requires_grad_()}
        return [q, k, v, kernel], {**options, **(bias if rpb else {})}

    return Case(neighborhood_attention, name, build)


LARGE = [
    large_case("sequence, long window", (53,), 41),
    large_case("sequence, causal, stride", (41,), 9, is_causal=True, stride=4, dilation=2),
    large_case("image, bias", (7, 10), (5, 7), rpb=True),
    large_case("image, unequal residues", (9, 7), (3, 3), dilation=(2, 2)),
    large_case("image, truncated, stride", (6, 11), (6, 5), border="truncated", stride=(4, 3), dilation=(1, 2)),
    large_case("volume, bias", (3, 4, 5), (2, 3, 4), rpb=True),
    large_case("volume, mixed", (3, 4, 3), 3, is_causal=(False, True, False), border="truncated", dilation=(1, 2, 9)),
]
NAMES = (
    "plain",
    "window of one cell",
    "stride",
    "truncated, window larger than the grid",
    "one cell",
    "strided",
    "no image",
)
SMALL = [case for case in cases_of("neighborhood_attention") if case.name in NAMES]


@pytest.mark.parametrize("case", [*SMALL, *LARGE], ids=str)
def test_float32_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float32, "triton")


@pytest.mark.parametrize("case", [LARGE[2], LARGE[4]], ids=str)
def test_float16_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float16, "triton")


def test_bias_gradient_of_the_kernel_is_that_of_the_deterministic_path() -> None:
    case = LARGE[2]
    args, kwargs = case.inputs(torch.float32)
    expected = gradients(run(case, args, kwargs, "triton"), leaves(args, kwargs))[-1]
    torch.use_deterministic_algorithms(False)
    actual = gradients(run(case, args, kwargs, "triton"), leaves(args, kwargs))[-1]
    torch.testing.assert_close(actual, expected, atol=4e-5 * max(1.0, float(expected.abs().max())), rtol=0)


def test_two_runs_give_equal_bits() -> None:
    runs = []
    for _ in range(2):
        args, kwargs = LARGE[0].inputs(torch.float32)
        outputs = run(LARGE[0], args, kwargs, "triton")
        runs.append([*outputs, *gradients(outputs, leaves(args, kwargs))])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))
