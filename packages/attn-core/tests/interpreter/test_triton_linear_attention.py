"""The Triton kernels of linear_attention against the float64 reference, in the interpreter (chunks of 16)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_core import linear_attention
from attn_core.testing import Case, assert_matches_reference, cases_of, gradients, leaves, run


def guarded(x: Tensor) -> Tensor:
    """``x`` inside a buffer of NaN, with rows before and behind and columns behind: what is read there shows."""
    buffer = torch.full((*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    view = buffer[..., 1:-1, : x.shape[-1]]
    return view.copy_(x).requires_grad_()


def large_case(
    name: str,
    tokens: int,
    width: int = 20,
    value_width: int = 12,
    decay: bool = True,
    state: bool = False,
    keys: int | None = None,
    **options: Any,
) -> Case:
    """Several chunks and tiles; NaN around every operand."""

    def build(dtype: torch.dtype, _device: str) -> tuple[list[Any], dict[str, Any]]:
        def data(width: int, tokens: int = keys or tokens) -> Tensor:
            x = torch.randn(1, 2, tokens, width, dtype=torch.float64) * 0.5
            return guarded((x.abs() + 0.1 if options.get("normalize") else x).to(dtype))

        arguments = dict(options)
        if decay:  # a constant: its gradient is the torch backend's
            arguments["log_decay"] = torch.tensor([-0.05, -3.0])
        if state:
            arguments["initial_state"] = guarded(torch.randn(1, 2, width, value_width))
        return [data(width, tokens), data(width), data(value_width)], arguments

    return Case(linear_attention, name, build)


LARGE = [
    large_case("a rest behind three chunks", 53, state=True, scale=0.3),
    large_case("both ways", 53, state=True, causal=False, scale=0.3),
    large_case("both ways, no decay", 48, causal=False, decay=False),
    large_case("several tiles of features", 35, width=37, value_width=50, state=True),
    large_case("fewer keys than queries", 53, keys=21, state=True, causal=False),
    large_case("more keys than queries", 18, keys=53, state=True, causal=False),
    large_case("fewer keys than queries, no decay", 40, keys=17, causal=False, decay=False),
    large_case("more keys than queries, normalized", 5, keys=37, normalize=True, eps=1e-3, causal=False),
    large_case("normalized", 40, normalize=True, eps=1e-3, causal=False),
    large_case("normalized, causal", 40, normalize=True, value_width=16),
]


@pytest.mark.parametrize("case", [*cases_of("linear_attention"), *LARGE], ids=str)
def test_float32_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float32, "triton")


# What differs in 16 bits is the conversion of products and states: one case of each form.
@pytest.mark.parametrize("case", [LARGE[0], LARGE[3], LARGE[7], LARGE[9]], ids=str)
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


def test_sums_beyond_float16_stay_finite() -> None:
    q, k, v = (torch.full((1, 1, 40, 16), value, dtype=torch.float16) for value in (1e-3, 30.0, 30.0))
    out, state = linear_attention(q, k, v, backend="triton")
    expected, expected_state = linear_attention(q.double(), k.double(), v.double(), backend="reference")
    torch.testing.assert_close(out.double(), expected, rtol=3e-3, atol=0)
    torch.testing.assert_close(state.double(), expected_state, rtol=1e-5, atol=0)
