"""merge_attention: what it is for, its properties, and every message."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_core import attention, merge_attention
from attn_core.testing import relative_error


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=20)
@given(parts=st.lists(st.integers(0, 20), min_size=1, max_size=5))
def test_attention_to_parts_of_the_keys_merges_to_attention_to_all_with_its_gradients(parts: list[int]) -> None:
    q, k, v = (
        x.requires_grad_() for x in (random(2, 4, 5, 4), random(2, 2, sum(parts), 4), random(2, 2, sum(parts), 3))
    )
    pieces = [attention(q, *kv) for kv in zip(k.split(parts, 2), v.split(parts, 2), strict=True)]
    merged = merge_attention([out for out, _ in pieces], [lse for _, lse in pieces])
    whole = attention(q, k, v)
    for actual, expected in zip(merged, whole, strict=True):
        assert relative_error(actual, expected) <= 1e-10

    def gradients(out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        loss = (out * random(*out.shape, seed=7)).sum() + lse.masked_fill(lse.isneginf(), 0.0).sin().sum()
        return torch.autograd.grad(loss, (q, k, v))

    for actual, expected in zip(gradients(*merged), gradients(*whole), strict=True):
        assert relative_error(actual, expected) <= 1e-10


@settings(deadline=None, max_examples=20)
@given(count=st.integers(1, 6), cut=st.integers(1, 5), seed=st.integers(0, 99))
def test_order_and_grouping_of_the_parts_do_not_matter(count: int, cut: int, seed: int) -> None:
    outs, lses = random(count, 2, 2, 3, 4), random(count, 2, 2, 3, seed=1) * 10
    expected = merge_attention(outs, lses)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    cut = min(cut, count)
    first = merge_attention(outs[:cut], lses[:cut])
    staged = merge_attention([first[0], *outs[cut:]], [first[1], *lses[cut:]])
    for actual in (merge_attention(outs[order], lses[order]), staged):
        for a, b in zip(actual, expected, strict=True):
            assert relative_error(a, b) <= 1e-12


def test_one_part_is_returned_as_it_is() -> None:
    out, lse = random(1, 2, 3, 4), random(1, 2, 3)
    merged = merge_attention([out], [lse])
    assert torch.equal(merged[0], out)
    assert torch.equal(merged[1], lse)


def test_what_a_part_without_keys_holds_is_never_read() -> None:
    outs, lses = random(2, 1, 1, 3, 4), random(2, 1, 1, 3)
    outs[1], lses[1] = math.nan, -math.inf
    outs.requires_grad_()
    lses.requires_grad_()
    out, lse = merge_attention(outs, lses)
    assert torch.equal(out, outs[0])
    (out.sum() + lse.sum()).backward()
    assert outs.grad is not None
    assert lses.grad is not None
    assert torch.equal(outs.grad[1], torch.zeros_like(outs[1]))
    assert torch.equal(lses.grad[1], torch.zeros_like(lses[1]))


def make(**replaced: object) -> dict[str, object]:
    return {"outs": [torch.zeros(2, 3, 5, 8)] * 2, "lses": [torch.zeros(2, 3, 5)] * 2, **replaced}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"outs": [], "lses": []}, "merge_attention: outs and lses must have one entry for each part.* got 0 and 0"),
        (
            {"lses": torch.zeros(3, 2, 3, 5)},
            "outs and lses must have one entry for each part, at least one, got 2 and 3",
        ),
        ({"outs": torch.zeros(2, 3, 5, 8)}, r"outs\[0\] must have 4 dimensions \(B H N Dv\), got shape \(3, 5, 8\)"),
        ({"outs": torch.zeros(2, 2, 3, 5, 8).int()}, r"outs\[0\] must be one of float64"),
        ({"outs": [torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 5)]}, r"outs\[1\] must have 4 dimensions"),
        ({"outs": [torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 4, 8)]}, r"outs\[1\] must have size 5 along dimension 2"),
        (
            {"outs": [torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 5, 8).half()]},
            r"outs\[1\] must have the dtype of outs\[0",
        ),
        (
            {"outs": [torch.zeros(2, 3, 5, 8), torch.zeros(2, 3, 5, 8, device="meta")]},
            r"outs\[1\] must be on the device",
        ),
        ({"lses": torch.zeros(2, 2, 3, 5, 1)}, r"lses\[0\] must have 3 dimensions \(B H N\)"),
        ({"lses": torch.zeros(2, 2, 3, 4)}, r"lses\[0\] must have size 5 along dimension 2 \(as in outs\[0\]\)"),
        (
            {"lses": torch.zeros(2, 2, 3, 5).half()},
            r"lses\[0\] must be one of float32, got lses\[0\].dtype=torch.float16",
        ),
        ({"lses": torch.zeros(2, 2, 3, 5, device="meta")}, r"lses\[0\] must be on the device of outs\[0\] \(cpu\)"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        merge_attention(**make(**changes))  # pyright: ignore[reportArgumentType]
