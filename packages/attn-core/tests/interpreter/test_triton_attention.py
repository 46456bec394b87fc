"""The Triton kernels of attention against the float64 reference, in the interpreter (tiles of 16 queries, 32 keys)."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

from attn_core import attention
from attn_core.testing import Case, assert_matches_reference, cases_of, gradients, leaves, run


def guarded(x: Tensor) -> Tensor:
    """``x`` inside a buffer of NaN, with rows before and behind and columns behind: what is read there shows."""
    buffer = torch.full((*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    view = buffer[..., 1:-1, : x.shape[-1]]
    return view.copy_(x).requires_grad_()


def large_case(name: str, queries: int, keys: int, width: int = 20, value_width: int = 12, **arguments: Any) -> Case:
    """Several tiles each way; NaN around every operand. Tuples in ``arguments`` are shapes of random tensors."""

    def build(dtype: torch.dtype, _device: str) -> tuple[list[Any], dict[str, Any]]:
        def data(*shape: int) -> Tensor:
            return guarded(torch.randn(shape, dtype=torch.float64).to(dtype))

        options = dict(arguments)
        if "bias" in options:
            options["bias"] = data(*options["bias"])
        if "axis_bias" in options:
            options["axis_bias"] = [data(*shape) for shape in options["axis_bias"]]
        for name in ("cu_seqlens_q", "cu_seqlens_k"):
            if name in options:
                options[name] = torch.tensor(options[name], dtype=torch.int32)
        if options.pop("mask", False):
            options["key_mask"] = torch.rand(1, keys) > 0.3
        heads, key_heads = 2, 1
        return [
            data(1, heads, queries, width),
            data(1, key_heads, keys, width),
            data(1, key_heads, keys, value_width),
        ], options

    return Case(attention, name, build)


LARGE = [
    large_case("keys end inside a tile", 35, 61, causal="upper_left"),
    large_case("fewer keys than queries", 40, 18, causal="lower_right", mask=True),
    large_case("whole bias, causal", 20, 45, causal="lower_right", bias=(1, 2, 20, 45)),
    large_case("bias of one row of keys", 33, 40, bias=(1, 1, 1, 40)),
    large_case("bias of queries", 33, 40, bias=(1, 2, 33, 1)),
    large_case("bias over heads beside axes", 18, 54, bias=(1, 1, 18, 54), axis_bias=[(1, 2, 18, 6), (1, 1, 18, 9)]),
    large_case("rows wider than a tile", 18, 66, axis_bias=[(1, 2, 18, 2), (1, 2, 18, 33)], causal="lower_right"),
    large_case("narrow rows", 18, 65, axis_bias=[(1, 2, 18, 13), (1, 2, 18, 5)]),
    large_case("one axis", 18, 40, axis_bias=[(1, 2, 18, 40)]),
    large_case("three axes", 18, 60, axis_bias=[(1, 2, 18, 3), (1, 1, 18, 4), (1, 2, 18, 5)], mask=True),
    large_case("four axes", 17, 36, axis_bias=[(1, 2, 17, 2), (1, 1, 17, 3), (1, 2, 17, 2), (1, 2, 17, 3)]),
    large_case("window", 50, 80, window_size=(9, 3), mask=True),
    large_case(
        "packed", 50, 80, cu_seqlens_q=(0, 1, 34, 34, 50), cu_seqlens_k=(0, 3, 40, 77, 77), causal="lower_right"
    ),
    large_case(
        "packed, bias beside axes",
        35,
        66,
        cu_seqlens_q=(0, 20, 33),
        cu_seqlens_k=(0, 35, 66),
        window_size=(20, -1),
        bias=(1, 2, 35, 66),
        axis_bias=[(1, 2, 35, 2), (1, 2, 35, 33)],
    ),
    large_case("width 40", 17, 33, width=40, value_width=3),
]


@pytest.mark.parametrize("case", [*cases_of("attention"), *LARGE], ids=str)
def test_float32_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float32, "triton")


@pytest.mark.parametrize(
    "case", [c for c in cases_of("attention") if c.name in ("plain", "everything")] + LARGE[5:6], ids=str
)
def test_float16_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float16, "triton")


@pytest.mark.parametrize("case", [LARGE[1], LARGE[5]], ids=str)
def test_two_runs_give_equal_bits(case: Case) -> None:
    runs = []
    for _ in range(2):
        args, kwargs = case.inputs(torch.float32)
        outputs = run(case, args, kwargs, "triton")
        runs.append([*outputs, *gradients(outputs, leaves(args, kwargs))])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


SHARED = [
    large_case("rows of a tile share an entry of either table", 18, 48, axis_bias=[(1, 2, 18, n) for n in (8, 2, 3)]),
    large_case("rows of a tile share an entry of the first", 18, 72, axis_bias=[(1, 2, 18, n) for n in (3, 8, 3)]),
]


@pytest.mark.parametrize("case", [*SHARED, LARGE[9], LARGE[5]], ids=str)
def test_no_addition_meets_another_in_one_entry(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    # Two lanes that add to one entry at once do so in any order, and equal bits are promised.
    met: list[bool] = []
    original = InterpreterBuilder.create_atomic_rmw

    def create(self: Any, operation: Any, pointers: Any, values: Any, mask: Any, *rest: Any) -> Any:
        entries = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        met.append(len(np.unique(entries)) < len(entries))
        return original(self, operation, pointers, values, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_atomic_rmw", create)
    assert_matches_reference(case, torch.float32, "triton")
    assert met
    assert not any(met)


def test_broadcast_strides_and_a_transposed_bias_are_read_in_place() -> None:
    def build(dtype: torch.dtype, _device: str) -> tuple[list[Any], dict[str, Any]]:
        q = torch.randn(2, 19, 2, 8, dtype=torch.float64).to(dtype).transpose(1, 2).requires_grad_()
        k = torch.randn(1, 1, 21, 8, dtype=torch.float64).to(dtype).expand(2, 2, 21, 8).requires_grad_()
        v = torch.randn(2, 2, 4, 21, dtype=torch.float64).to(dtype).transpose(2, 3).requires_grad_()
        bias = torch.randn(2, 1, 21, 19, dtype=torch.float64).to(dtype).transpose(2, 3).expand(2, 2, 19, 21)
        return [q, k, v], {"bias": bias.requires_grad_()}

    assert_matches_reference(Case(attention, "strides", build), torch.float32, "triton")


@pytest.mark.parametrize("hidden", ["bias", "row"])
def test_minus_infinity_in_the_bias_hides_keys_and_rows(hidden: str) -> None:
    def build(dtype: torch.dtype, _device: str) -> tuple[list[Any], dict[str, Any]]:
        data = [torch.randn(1, 2, n, 8, dtype=torch.float64).to(dtype).requires_grad_() for n in (18, 35, 35)]
        bias = torch.randn(1, 1, 18, 35, dtype=torch.float64).to(dtype)
        bias[..., 3 if hidden == "row" else slice(None), slice(None) if hidden == "row" else slice(3, 30)] = -torch.inf
        return data, {"bias": bias}

    assert_matches_reference(Case(attention, hidden, build), torch.float32, "triton")


def test_log_sum_exp_alone_is_differentiable() -> None:
    q, k, v = (torch.randn(1, 1, n, 8, requires_grad=True) for n in (5, 9, 9))
    expected = torch.autograd.grad(attention(q, k, v, backend="reference")[1].sum(), (q, k, v), allow_unused=True)
    actual = torch.autograd.grad(attention(q, k, v, backend="triton")[1].sum(), (q, k, v))
    for want, got in zip(expected, actual, strict=True):
        torch.testing.assert_close(got, torch.zeros_like(got) if want is None else want, atol=4e-5, rtol=0)


def test_offsets_beyond_int32_reach_their_rows() -> None:
    # Virtual memory alone: 5.4 GB of addresses, of which a few pages are touched.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    try:
        memory = torch.empty(40 * 2**26 + 64, dtype=torch.float16)
    except RuntimeError:
        pytest.skip("the system does not promise 5.4 GB of addresses")
    far = memory.as_strided((1, 1, 40, 8), (0, 0, 2**26, 1))
    far.copy_(torch.randn(1, 1, 40, 8))
    near = far.clone()
    for arguments in ((far, near, near), (near, far, near), (near, near, far)):
        out, lse = attention(*arguments, backend="triton")
        expected, expected_lse = attention(near, near, near, backend="triton")
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)
