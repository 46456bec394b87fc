"""The Triton kernels of focal modulation against the float64 reference, in the interpreter (8 cells × 16 channels)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_core import focal_modulation
from attn_core.testing import Case, assert_matches_reference, cases_of, gradients, leaves, run

# Few: the interpreter takes a millisecond for each tap of each tile.
NAMES = ("projection", "kernel of one pixel", "one pixel", "no image", "no pixel")
CASES = [case for case in cases_of("focal_modulation") if case.name in NAMES]


def _several_tiles(dtype: torch.dtype, _device: str) -> tuple[list[Any], dict[str, Any]]:
    """Two tiles of cells and of channels; NaN around the projection's slices."""

    def data(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64).to(dtype)

    projection = torch.full((1, 5, 13, 24), float("nan"), dtype=dtype)
    ctx, gates = projection[:, 1:-1, 1:-1, 1:18], projection[:, 1:-1, 1:-1, 19:22]
    ctx.copy_(data(1, 3, 11, 17))
    gates.copy_(data(1, 3, 11, 3))
    weights = [(data(17, 1, k, k) / k).requires_grad_() for k in (1, 3)]
    return [ctx.permute(0, 3, 1, 2).requires_grad_(), gates.permute(0, 3, 1, 2).requires_grad_(), weights], {
        "normalize": True
    }


LARGE = Case(focal_modulation, "several tiles", _several_tiles)


@pytest.mark.parametrize("case", [*CASES, LARGE], ids=str)
def test_float32_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float32, "triton")


@pytest.mark.parametrize("case", [c for c in CASES if c.name == "kernel of one pixel"], ids=str)
def test_float16_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float16, "triton")


def test_two_runs_give_equal_bits() -> None:
    runs = []
    for _ in range(2):
        args, kwargs = LARGE.inputs(torch.float32)
        outputs = run(LARGE, args, kwargs, "triton")
        runs.append([*outputs, *gradients(outputs, leaves(args, kwargs))])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_no_level_is_refused_with_the_reason() -> None:
    with pytest.raises(RuntimeError, match="the kernel needs at least one level"):
        focal_modulation(torch.zeros(1, 2, 3, 3), torch.zeros(1, 1, 3, 3), [], backend="triton")
