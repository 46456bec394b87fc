"""The Triton kernels of block attention against the float64 reference, in the interpreter (tiles of 16 × 16)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_core import block_attention, halo_index, window_index
from attn_core.testing import Case, assert_matches_reference, cases_of, gradients, leaves, run


def guarded(x: Tensor) -> Tensor:
    """``x`` inside a buffer of NaN, with rows before and behind and columns behind: what is read there shows."""
    buffer = torch.full((*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    view = buffer[..., 1:-1, : x.shape[-1]]
    return view.copy_(x).requires_grad_()


def large_case(
    name: str,
    q_index: Tensor,
    kv_index: Tensor,
    table: Tensor | None = None,
    *,
    tokens: int = 36,
    width: int = 20,
    value_width: int = 12,
    **arguments: Any,
) -> Case:
    """Several tiles each way; NaN around every operand. Tuples in ``arguments`` are shapes of random tensors."""

    def build(dtype: torch.dtype, _device: str) -> tuple[list[Any], dict[str, Any]]:
        def data(*shape: int) -> Tensor:
            return guarded(torch.randn(shape, dtype=torch.float64).to(dtype))

        options = dict(arguments)
        if "kv_weight" in options:
            options["kv_weight"] = data(*options["kv_weight"])
        if "axis_bias" in options:
            options["axis_bias"] = [data(*shape) for shape in options["axis_bias"]]
        q, k, v = data(2, 2, tokens, width), data(2, 1, tokens, width), data(2, 1, tokens, value_width)
        return [q, k, v, q_index, kv_index, table], options

    return Case(block_attention, name, build)


WINDOWS, SMALL = window_index(6, 6, (3, 3)), window_index(6, 6, (2, 2))
HALVES = torch.arange(36).view(1, 1, 2, 18)
LARGE = [
    large_case(
        "one list for queries and keys",
        WINDOWS,
        WINDOWS,
        torch.tensor([[[[0, 1, 2], [1, 3, 3], [2, 0, 1], [3, 2, 0]]]]),
    ),
    large_case("small blocks packed", SMALL, SMALL, torch.randint(-1, 9, (2, 2, 9, 7)), kv_weight=(2, 2, 9, 7)),
    large_case(
        "blocks larger than a tile",
        HALVES,
        HALVES,
        torch.tensor([[[[0, 1, 1], [1, -1, 0]]]]),
        kv_weight=(2, 1, 2, 3),
        axis_bias=[(2, 2, 36, 3), (1, 2, 36, 6)],
    ),
    large_case("one axis over a large block", HALVES, HALVES, causal=True, axis_bias=[(2, 1, 36, 18)]),
    large_case("halo", WINDOWS, halo_index(6, 6, (3, 3), (1, 1)), axis_bias=[(2, 2, 36, 5), (1, 2, 36, 5)]),
    large_case(
        "four axes",
        WINDOWS,
        halo_index(6, 6, (3, 3), (0, 1)),
        axis_bias=[(1, 2, 36, 3), (1, 1, 36, 1), (1, 2, 36, 1), (1, 2, 36, 5)],
    ),
    large_case(
        "tables in clusters",
        torch.randint(0, 36, (2, 2, 3, 18)),
        torch.randint(-1, 36, (2, 1, 3, 13)),
        causal=True,
        self_logit=-3.0,
        reduce="mean",
        axis_bias=[(2, 2, 36, 13), (1, 2, 36, 1)],
    ),
    large_case("width 40", SMALL, SMALL, width=40, value_width=3),
]


# What the other cases cover as well is left out: a case of 72 programs takes two seconds here.
COVERED = {
    "windows",
    "wide value",
    "odd width",
    "halo with axis bias",
    "routed halo with axis bias",
    "routed per head",
    "routed",
    "routed, one table for all images",
    "routed to most regions",
    "soft routing",
    "causal",
    "self logit",
}
CASES = [*(case for case in cases_of("block_attention") if case.name not in COVERED), *LARGE]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float32, "triton")


@pytest.mark.parametrize("case", [LARGE[1], LARGE[4]], ids=str)
def test_float16_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float16, "triton")


@pytest.mark.parametrize("case", [LARGE[3], LARGE[6]], ids=str)
def test_two_runs_give_equal_bits(case: Case) -> None:
    runs = []
    for _ in range(2):
        args, kwargs = case.inputs(torch.float32)
        outputs = run(case, args, kwargs, "triton")
        runs.append([*outputs, *gradients(outputs, leaves(args, kwargs))])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_keys_that_no_block_lists_get_zero_gradients() -> None:
    q, k, v = (torch.randn(1, 1, 9, 4, requires_grad=True) for _ in range(3))
    index = torch.tensor([[[[0, 1, 2], [3, 4, -1]]]])
    for kv_index in (index, index.clone()):  # written at the token, and through shares of slots
        out, lse = block_attention(q, k, v, index, kv_index, backend="triton")
        assert torch.equal(out[:, :, 5:], torch.zeros(1, 1, 4, 4))
        assert (lse[:, :, 5:] == -torch.inf).all()
        for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
            assert torch.equal(gradient[:, :, 5:], torch.zeros(1, 1, 4, 4))
