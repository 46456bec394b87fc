"""The Triton kernels of channel attention against the float64 reference, in the interpreter (tiles of 16 × 16)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_core import channel_attention
from attn_core.testing import Case, assert_matches_reference, cases_of, gradients, leaves, run


def guarded(x: Tensor) -> Tensor:
    """``x`` inside a buffer of NaN: what is read before, behind or beside it shows."""
    buffer = torch.full((*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    view = buffer[..., 1:-1, : x.shape[-1]]
    return view.copy_(x)


def large_case(name: str, tokens: int, channels: int, *, tokens_innermost: bool = False, **options: Any) -> Case:
    """Several tiles of tokens and of channels; NaN around every operand."""

    def build(dtype: torch.dtype, _device: str) -> tuple[list[Any], dict[str, Any]]:
        shape = (2, 2, channels, tokens) if tokens_innermost else (2, 2, tokens, channels)
        data = [guarded(torch.randn(shape, dtype=torch.float64).to(dtype)) for _ in range(3)]
        data = [t.mT if tokens_innermost else t for t in data]
        return [t.requires_grad_() for t in data], {"scale": tokens**-0.5, **options}

    return Case(channel_attention, name, build)


LARGE = [
    large_case("several tiles", 37, 21),
    large_case("several tiles of a map", 35, 35, tokens_innermost=True, negate_max=True),
    large_case("several tiles, transposed", 33, 40, transpose=True),
]


@pytest.mark.parametrize("case", [*cases_of("channel_attention"), *LARGE], ids=str)
def test_float32_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float32, "triton")


@pytest.mark.parametrize("case", [c for c in cases_of("channel_attention") if c.varied] + LARGE[1:2], ids=str)
def test_float16_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float16, "triton")


@pytest.mark.parametrize("case", LARGE[:1], ids=str)
def test_two_runs_give_equal_bits(case: Case) -> None:
    runs = []
    for _ in range(2):
        args, kwargs = case.inputs(torch.float32)
        outputs = run(case, args, kwargs, "triton")
        runs.append([*outputs, *gradients(outputs, leaves(args, kwargs))])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_too_many_channels_are_refused_with_the_reason() -> None:
    x = torch.zeros(1, 1, 2, 129)
    with pytest.raises(RuntimeError, match="the kernel holds 1 to 128 channels in float32, got 129"):
        channel_attention(x, x, x, backend="triton")
