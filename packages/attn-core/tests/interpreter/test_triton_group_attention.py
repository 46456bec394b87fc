"""The Triton kernels of grouped attention against the float64 reference, in the interpreter (tiles of 16 × 16)."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_core import group_attention
from attn_core.testing import Case, assert_matches_reference, cases_of, gradients, leaves, relative_error, run


def guarded(x: Tensor) -> Tensor:
    """``x`` inside a buffer of NaN, with rows before and behind and columns behind: what is read there shows."""
    buffer = torch.full((*x.shape[:-2], x.shape[-2] + 2, x.shape[-1] + 3), float("nan"), dtype=x.dtype)
    view = buffer[..., 1:-1, : x.shape[-1]]
    return view.copy_(x).requires_grad_()


def large_case(name: str, queries: int, keys: int, width: int = 20, value_width: int = 12, **arguments: Any) -> Case:
    """Several tiles each way; NaN around every operand. Tuples in ``arguments`` are shapes of random tensors."""

    def build(dtype: torch.dtype, _device: str) -> tuple[list[Any], dict[str, Any]]:
        def data(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return guarded(torch.randn(shape, dtype=torch.float64).to(dtype))

        options = dict(arguments)
        groups = options.pop("groups", 3)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        for factor in {"group_weight", "group_gate"} & set(options):
            options[factor] = data(*options[factor], groups, dtype=exact)
        if "bias" in options:
            options["bias"] = data(*options["bias"])
        if options.pop("mask", False):
            options["key_mask"] = torch.rand(1, keys) > 0.3
        group = torch.randint(-1, groups, (1, keys))
        if options.pop("sorted", False):
            group = group.sort(1).values
        heads, key_heads = 2, 1
        args = [data(1, heads, queries, width), data(1, key_heads, keys, width), data(1, key_heads, keys, value_width)]
        return [*args, group, groups], options

    return Case(group_attention, name, build)


LARGE = [
    large_case("groups of several tiles", 20, 75, causal="upper_left"),
    large_case("sorted groups", 20, 45, causal="lower_right", sorted=True, groups=5, group_gate=(1, 2, 20)),
    large_case("fewer keys than queries", 40, 18, causal="lower_right", mask=True, group_weight=(1, 2, 40)),
    large_case("bias", 33, 40, bias=(1, 2, 33, 40), group_weight=(1, 2, 1)),
    large_case("bias of keys", 33, 40, bias=(1, 1, 1, 40), causal="upper_left"),
    large_case("width 40", 17, 33, width=40, value_width=3, group_gate=(1, 2, 17)),
]


@pytest.mark.parametrize("case", [*cases_of("group_attention"), *LARGE], ids=str)
def test_float32_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float32, "triton")


@pytest.mark.parametrize(
    "case", [c for c in cases_of("group_attention") if c.name in ("weight", "everything")] + LARGE[1:2], ids=str
)
def test_float16_equals_float64_reference(case: Case) -> None:
    assert_matches_reference(case, torch.float16, "triton")


@pytest.mark.parametrize("case", [LARGE[2]], ids=str)
def test_two_runs_give_equal_bits(case: Case) -> None:
    runs = []
    for _ in range(2):
        args, kwargs = case.inputs(torch.float32)
        outputs = run(case, args, kwargs, "triton")
        runs.append([*outputs, *gradients(outputs, leaves(args, kwargs))])
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_masses_alone_need_no_column_of_values() -> None:
    q, k = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 30, 8)
    group = torch.randint(0, 3, (1, 30))
    _, expected = group_attention(q, k, k, group, 3, backend="triton")
    out, masses = group_attention(q, k, k[..., :0], group, 3, backend="triton")
    assert out.shape == (1, 2, 20, 0)
    assert torch.equal(masses, expected)


def test_a_group_far_below_the_others_keeps_its_own_average() -> None:
    q, v = torch.ones(1, 1, 1, 1), torch.tensor([2.0, 4.0, 100.0]).view(1, 1, 3, 1)
    k = torch.tensor([0.0, 0.0, 500.0]).view(1, 1, 3, 1)
    weight = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    group = torch.tensor([[0, 0, 1]])
    out, _ = group_attention(q, k, v, group, 2, group_weight=weight, backend="triton")
    assert relative_error(out, torch.full_like(out, 3.0)) <= 1e-6
