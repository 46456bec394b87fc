"""attention: the equation by loops, its properties, and every message."""

import importlib
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_core import attention, merge_attention
from attn_core.testing import TOLERANCE, cases_of, relative_error


def by_loops(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    bias: Tensor | None = None,
    axis_bias: list[Tensor] | None = None,
    key_mask: Tensor | None = None,
    causal: str | None = None,
    window_size: tuple[int, int] = (-1, -1),
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One query at a time, one visible key at a time, numbers only."""
    B, H, N, D = q.shape
    M, group = k.shape[2], H // k.shape[1]
    out, lse = q.new_zeros(B, H, N, v.shape[3]), q.new_full((B, H, N), -math.inf)
    sizes = [table.shape[3] for table in axis_bias or []]
    starts = [0, N] if cu_seqlens_q is None else cu_seqlens_q.tolist()
    key_starts = [0, M] if cu_seqlens_q is None else starts if cu_seqlens_k is None else cu_seqlens_k.tolist()
    left, right = window_size

    def hidden(i: int, j: int) -> bool:
        """By place alone, in the sequence of query i."""
        own = [s for s in range(len(starts) - 1) if starts[s] <= i < starts[s + 1]]
        if not own or not key_starts[own[0]] <= j < key_starts[own[0] + 1]:
            return True
        behind = (j - key_starts[own[0]]) - (i - starts[own[0]])  # of the diagonal
        if causal != "upper_left":
            behind -= (key_starts[own[0] + 1] - key_starts[own[0]]) - (starts[own[0] + 1] - starts[own[0]])
        return (causal is not None and behind > 0) or (0 <= left < -behind) or (0 <= right < behind)

    def at(x: Tensor, *index: int) -> float:
        return float(x[tuple(min(i, n - 1) for i, n in zip(index, x.shape, strict=True))])

    for b in range(B):
        for h in range(H):
            for i in range(N):
                weights = {}
                for j in range(M):
                    if key_mask is not None and not key_mask[b, j]:
                        continue
                    if hidden(i, j):
                        continue
                    s = float(q[b, h, i] @ k[b, h // group, j]) * (D**-0.5 if scale is None else scale)
                    if bias is not None:
                        s += at(bias, b, h, i, j)
                    rest = j
                    for table, size in reversed(list(zip(axis_bias or [], sizes, strict=True))):
                        s += at(table, b, h, i, rest % size)
                        rest //= size
                    weights[j] = math.exp(s)
                if weights:
                    total = sum(weights.values())
                    lse[b, h, i] = math.log(total)
                    out[b, h, i] = sum(w / total * v[b, h // group, j] for j, w in weights.items())
    return out, lse


@pytest.mark.parametrize("case", cases_of("attention"), ids=str)
def test_reference_equals_the_equation_by_loops(case: object) -> None:
    args, kwargs = case.inputs(torch.float64)  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
        expected = by_loops(*args, **kwargs)
        actual = attention(*args, **kwargs, backend="reference")
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) <= TOLERANCE[torch.float64]


LENGTHS = st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=25)
@given(
    lengths=LENGTHS,
    causal=st.sampled_from([None, "upper_left", "lower_right"]),
    window=st.sampled_from([None, (1, 2), (-1, 0), (3, -1)]),
)
def test_packed_sequences_equal_calls_one_by_one(
    lengths: list[tuple[int, int]], causal: Any, window: tuple[int, int] | None
) -> None:
    queries, keys = ([0, *itertools.accumulate(own)] for own in zip(*lengths, strict=True))
    q, k, v = random(2, 4, queries[-1], 4), random(2, 2, keys[-1], 4, seed=1), random(2, 2, keys[-1], 3, seed=2)
    starts = [torch.tensor(own, dtype=torch.int32) for own in (queries, keys)]
    packed = attention(q, k, v, causal=causal, window_size=window, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1])
    for rows, own in zip(itertools.pairwise(queries), itertools.pairwise(keys), strict=True):
        own_k, own_v = (x[:, :, slice(*own)] for x in (k, v))
        alone = attention(q[:, :, slice(*rows)], own_k, own_v, causal=causal, window_size=window)
        for part, expected in zip(packed, alone, strict=True):
            assert relative_error(part[:, :, slice(*rows)], expected) <= 1e-12


@pytest.mark.parametrize("keys", [700, 900])
def test_a_window_over_many_blocks_equals_a_mask(keys: int) -> None:
    q, k, v = random(1, 2, 700, 4), random(1, 1, keys, 4, seed=1), random(1, 1, keys, 4, seed=2)
    behind = torch.arange(keys) - torch.arange(700)[:, None] - (keys - 700)
    bias = torch.zeros(1, 1, 700, keys, dtype=torch.float64).masked_fill_((behind < -90) | (behind > 20), -math.inf)
    results = []
    for arguments in ({"window_size": (90, 20)}, {"bias": bias}):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out, lse = attention(*leaves, **arguments)
        results.append([out, lse, *torch.autograd.grad(out.sin().sum() + lse.sin().sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) <= 1e-10


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


lengths = st.integers(1, 40)


@settings(deadline=None, max_examples=25)
@given(n=lengths, m=lengths, seed=st.integers(0, 1000))
def test_permuting_the_keys_changes_nothing(n: int, m: int, seed: int) -> None:
    q, k, v, bias = random(1, 2, n, 4), random(1, 2, m, 4, seed=1), random(1, 2, m, 3, seed=2), random(1, 1, n, m)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    expected = attention(q, k, v, bias=bias)
    actual = attention(q, k[:, :, order], v[:, :, order], bias=bias[..., order])
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) <= 1e-10


@settings(deadline=None, max_examples=25)
@given(
    n=lengths, extra=st.integers(0, 10), cut=st.integers(0, 39), causal=st.sampled_from(["upper_left", "lower_right"])
)
def test_the_future_has_no_influence(n: int, extra: int, cut: int, causal: str) -> None:
    m = n + extra
    q, k, v = random(1, 2, n, 4), random(1, 2, m, 4, seed=1), random(1, 2, m, 4, seed=2)
    cut = min(cut, n - 1)
    first_hidden = cut + 1 + (extra if causal == "lower_right" else 0)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, :, first_hidden:] += 5
    changed_v[:, :, first_hidden:] -= 7
    expected = attention(q, k, v, causal=causal)[0][:, :, : cut + 1]  # pyright: ignore[reportArgumentType]
    actual = attention(q, changed_k, changed_v, causal=causal)[0][:, :, : cut + 1]  # pyright: ignore[reportArgumentType]
    assert relative_error(actual, expected) <= 1e-12


@settings(deadline=None, max_examples=15)
@given(parts=st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_key_sets_merge_exactly_through_lse(parts: list[int]) -> None:
    q, k, v = random(1, 2, 5, 4), random(1, 2, sum(parts), 4, seed=1), random(1, 2, sum(parts), 4, seed=2)
    pieces = [attention(q, *kv) for kv in zip(k.split(parts, 2), v.split(parts, 2), strict=True)]
    outs, lses = (torch.stack(x) for x in zip(*pieces, strict=True))
    weight = (lses - lses.logsumexp(0)).exp()[..., None]
    expected_out, expected_lse = attention(q, k, v)
    assert relative_error((outs * weight).sum(0), expected_out) <= 1e-10
    assert relative_error(lses.logsumexp(0), expected_lse) <= 1e-10


def test_a_batch_equals_its_images_one_by_one() -> None:
    q, k, v = random(3, 4, 9, 8), random(3, 2, 11, 8, seed=1), random(3, 2, 11, 8, seed=2)
    whole = attention(q, k, v)[0]
    pieces = torch.cat([attention(*(x[i : i + 1] for x in (q, k, v)))[0] for i in range(3)])
    assert relative_error(whole, pieces) <= 1e-12


def test_a_last_stride_other_than_one_is_read_right() -> None:
    """torch's CPU kernel misreads such tensors in silence."""
    q = random(1, 2, 4, 9).transpose(2, 3)
    assert relative_error(attention(q, q, q)[0], attention(*[q.contiguous()] * 3)[0]) <= 1e-12


@pytest.mark.parametrize(
    ("dtype", "grid"), [(torch.float32, (3, 4)), (torch.float64, (3, 4)), (torch.float32, (3, 700))]
)
def test_minus_infinity_in_an_axis_table_hides_its_keys(dtype: torch.dtype, grid: tuple[int, int]) -> None:
    results = []
    for backend in ("torch", "reference"):
        torch.manual_seed(0)
        q, k = (torch.randn(1, 2, n, 8, dtype=dtype, requires_grad=True) for n in (6, grid[0] * grid[1]))
        tables = [torch.randn(1, 2, 6, n, dtype=dtype) for n in grid]
        tables[0][..., 1] = -math.inf
        out, lse = attention(q, k, k, axis_bias=[t.requires_grad_() for t in tables], backend=backend)  # pyright: ignore[reportArgumentType]
        results.append([out, lse, *torch.autograd.grad(out.sum() + lse.sum(), (q, k, *tables))])
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) <= 2 * TOLERANCE[dtype]


def test_zero_lse_is_not_taken_for_a_dead_row() -> None:
    q = torch.zeros(1, 1, 3, 4, requires_grad=True)
    out, lse = attention(q, torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), bias=torch.zeros(1, 1, 3, 1))
    assert torch.equal(lse, torch.zeros(1, 1, 3))
    assert torch.equal(out, torch.zeros(1, 1, 3, 4))


def test_the_kernel_says_which_widths_it_holds() -> None:
    obstacle = importlib.import_module("attn_core.ops.attention").triton_obstacle
    q, narrow = torch.zeros(1, 1, 2, 96), torch.zeros(1, 1, 2, 64)
    assert obstacle(q, q, [q], (), None) is None
    assert obstacle(narrow, narrow, [q], (1, 1), None) is None
    message = "the kernel holds head widths up to 64 in float32 with a window or sequences beside axis_bias, got 96"
    assert obstacle(q, q, [q], (1, 1), None) == obstacle(q, q, [q], (), torch.zeros(1, 2)) == message
    assert obstacle(q.half(), q, [q], (1, 1), None) is None


def make(**replaced: object) -> dict[str, object]:
    return {"q": torch.zeros(2, 4, 6, 8), "k": torch.zeros(2, 2, 9, 8), "v": torch.zeros(2, 2, 9, 5), **replaced}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(4, 6, 8)}, r"attention: q must have 4 dimensions \(B H N D\), got shape \(4, 6, 8\)"),
        ({"q": torch.zeros(2, 4, 6, 8, dtype=torch.int32)}, "attention: q must be one of float64, float32"),
        ({"k": torch.zeros(2, 2, 9, 7)}, r"k must have size 8 along dimension 3 \(the width of q\)"),
        ({"k": torch.zeros(1, 2, 9, 8)}, r"k must have size 2 along dimension 0 \(the batch of q\)"),
        ({"v": torch.zeros(2, 2, 8, 5)}, r"v must have size 9 along dimension 2 \(the tokens of k\)"),
        ({"v": torch.zeros(2, 1, 9, 5)}, r"v must have size 2 along dimension 1 \(the heads of k\)"),
        ({"k": torch.zeros(2, 3, 9, 8), "v": torch.zeros(2, 3, 9, 5)}, "heads of q must be a multiple .* got 4 and 3"),
        (
            {"v": torch.zeros(2, 2, 9, 5).half()},
            r"v must have the dtype of q \(torch.float32\), got v.dtype=torch.float16",
        ),
        ({"bias": torch.zeros(6, 9)}, r"bias must have 4 dimensions \(B H N M\)"),
        ({"bias": torch.zeros(2, 3, 6, 9)}, r"bias must broadcast to B H N M = \(2, 4, 6, 9\)"),
        ({"key_mask": torch.zeros(2, 9)}, "key_mask must be one of bool, got key_mask.dtype=torch.float32"),
        ({"key_mask": torch.zeros(2, 8, dtype=torch.bool)}, r"key_mask must broadcast to B M = \(2, 9\)"),
        ({"causal": "lower"}, "causal must be one of None, 'upper_left', 'lower_right', got causal='lower'"),
        ({"axis_bias": [torch.zeros(2, 4, 6, 2)]}, "axis_bias must span a grid of 9 cells.* got axis_bias=2"),
        ({"axis_bias": [torch.zeros(2, 4, 5, 9)]}, r"axis_bias\[0\] must broadcast to B H N n"),
        ({"axis_bias": [torch.zeros(2, 4, 1, 9)]}, r"axis_bias\[0\] must have size 6 along dimension 2"),
        ({"axis_bias": [torch.zeros(4, 6, 9)]}, r"axis_bias\[0\] must have 4 dimensions"),
        ({"window_size": (1, -2)}, "window_size must be at least -1, got window_size=-2"),
        ({"cu_seqlens_k": torch.arange(2)}, "cu_seqlens_k must stand beside cu_seqlens_q, got cu_seqlens_q=None"),
        ({"cu_seqlens_q": torch.zeros(2)}, "cu_seqlens_q must be one of int32, int64, got cu_seqlens_q.dtype"),
        ({"cu_seqlens_q": torch.zeros(2, 2).int()}, r"cu_seqlens_q must have 1 dimensions \(S\+1\)"),
        (
            {"cu_seqlens_q": torch.tensor([], dtype=torch.int32)},
            "cu_seqlens_q must hold at least the 0",
        ),
        ({"cu_seqlens_q": torch.tensor([1, 6])}, "cu_seqlens_q must begin with 0, got cu_seqlens_q=1"),
        ({"cu_seqlens_q": torch.tensor([0, 4, 2, 6])}, "cu_seqlens_q must not decrease, got 4 followed by 2; lengths"),
        ({"cu_seqlens_q": torch.tensor([0, 7])}, "cu_seqlens_q must end with 6 at most, the number of queries, got 7"),
        (
            {"cu_seqlens_q": torch.tensor([0, 6]), "cu_seqlens_k": torch.tensor([0, 4, 10])},
            "cu_seqlens_k must end with 9 at most, the number of keys, got 10",
        ),
        (
            {"cu_seqlens_q": torch.tensor([0, 6]), "cu_seqlens_k": torch.tensor([0, 4, 9])},
            r"cu_seqlens_k must have size 2 along dimension 0 \(one more than sequences of queries\)",
        ),
        ({"v": torch.zeros(2, 2, 9, 5, device="meta")}, r"v must be on the device of q \(cpu\), got v on meta"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attention(**make(**changes))  # pyright: ignore[reportArgumentType]


def test_a_query_that_causality_and_a_mask_leave_without_a_key_is_dead() -> None:
    q, k, v = (torch.randn(1, 1, 4, 8) for _ in range(3))
    hidden = torch.tensor([[False, False, True, True]])
    out, lse = attention(q, k, v, causal="upper_left", key_mask=hidden)
    assert lse[0, 0, :2].isneginf().all()
    assert not out[0, 0, :2].any()
    cached = attention(q, k, v)
    merged, _ = merge_attention([out, cached[0]], [lse, cached[1]])
    assert relative_error(merged[:, :, :2], cached[0][:, :, :2]) <= 2e-6


def test_a_hidden_key_at_the_diagonal_does_not_count_behind_a_cache() -> None:
    q, k, v = torch.randn(1, 1, 4, 8), torch.randn(1, 1, 8, 8), torch.randn(1, 1, 8, 8)
    visible = torch.arange(8)[None] != 4
    out, _ = attention(q, k, v, causal="lower_right", key_mask=visible)
    expected, _ = attention(q[:, :, :1], k[:, :, :4], v[:, :, :4])
    assert relative_error(out[:, :, :1], expected) <= 2e-6


def test_thousands_of_hidden_keys_before_the_first_visible_one_leave_the_softmax_alone() -> None:
    q, k, v = torch.randn(1, 1, 40, 8), torch.randn(1, 1, 1300, 8), torch.randn(1, 1, 1300, 8)
    visible = (torch.arange(1300) >= 1270)[None]
    out, lse = attention(q, k, v, causal="lower_right", key_mask=visible)
    expected, expected_lse = attention(q, k[:, :, 1270:], v[:, :, 1270:], causal="lower_right")
    assert relative_error(out, expected) <= 2e-5
    assert relative_error(lse, expected_lse) <= 2e-5
