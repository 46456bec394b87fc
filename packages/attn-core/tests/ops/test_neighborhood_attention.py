"""neighborhood_attention: the windows by loops, its properties, peers, and every message."""

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_core import attention, neighborhood_attention
from attn_core.ops.neighborhood_attention import windows
from attn_core.testing import cases_of, relative_error


def seen_along_axis(
    i: int, length: int, kernel: int, dilation: int, stride: int, causal: bool, border: str
) -> list[int]:
    """The cells that cell i sees, in words of the paper: its residue's cells around the middle of its group."""
    own = list(range(i % dilation, length, dilation))
    p, n = own.index(i), len(own)
    group = [x for x in range(n) if x // stride == p // stride]
    if causal:
        last_of_group = min(group[0] + stride - 1, n - 1)
        return [own[x] for x in range(p + 1) if x > last_of_group - kernel]
    middle = min(group[0] + stride // 2, n - 1)
    window = list(range(middle - kernel // 2, middle - kernel // 2 + kernel))
    if border == "shifted":
        shift = max(0, -window[0]) - max(0, window[-1] - n + 1)
        window = [x + shift for x in window]
    return [own[x] for x in window if 0 <= x < n]


def by_loops(q: Tensor, k: Tensor, v: Tensor, kernel_size: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """One query at a time, over the list of the keys it sees."""
    grid = q.shape[2:-1]
    rules = [
        windows.per_axis(x, len(grid))
        for x in (kernel_size, *(options.get(name, default) for name, default in DEFAULTS.items()))
    ]
    out, lse = torch.zeros_like(v), q.new_zeros(q.shape[:-1])
    scale = options.get("scale")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    for cell in itertools.product(*map(range, grid)):
        seen = [
            seen_along_axis(i, length, *rule, border=options.get("border", "shifted"))
            for i, length, *rule in zip(cell, grid, *rules, strict=True)
        ]
        for b, h in itertools.product(range(q.shape[0]), range(q.shape[1])):
            logits, values = [], []
            for key in itertools.product(*seen):
                s = scale * (q[(b, h, *cell)] @ k[(b, h, *key)])
                if options.get("rpb") is not None:
                    index = [(j - i) // d + n - 1 for i, j, n, d in zip(cell, key, rules[0], rules[1], strict=True)]
                    s = s + options["rpb"][(h, *index)]
                logits.append(s)
                values.append(v[(b, h, *key)])
            scores = torch.stack(logits)
            out[(b, h, *cell)] = scores.softmax(0) @ torch.stack(values)
            lse[(b, h, *cell)] = scores.logsumexp(0)
    return out, lse


DEFAULTS: dict[str, Any] = {"dilation": 1, "stride": 1, "is_causal": False}


@pytest.mark.parametrize("case", cases_of("neighborhood_attention"), ids=str)
def test_reference_equals_loops_over_the_keys_in_the_window(case: Any) -> None:
    args, kwargs = case.inputs(torch.float64)
    with torch.no_grad():
        expected = by_loops(*args, **kwargs)
        for actual, loop in zip(neighborhood_attention(*args, **kwargs, backend="reference"), expected, strict=True):
            assert relative_error(actual, loop) <= 1e-12


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("border", ["shifted", "truncated"])
def test_window_as_large_as_the_grid_is_full_attention(border: Any) -> None:
    q = random(2, 3, 5, 7, 8)
    out, lse = neighborhood_attention(q, q, q, (9, 13) if border == "truncated" else (5, 7), border=border)
    full, full_lse = attention(*[q.flatten(2, 3)] * 3)
    assert relative_error(out.flatten(2, 3), full) <= 1e-12
    assert relative_error(lse.flatten(2), full_lse) <= 1e-12


def test_causal_window_as_long_as_the_sequence_is_causal_attention() -> None:
    q = random(1, 2, 9, 4)
    out, _ = neighborhood_attention(q, q, q, 9, is_causal=True)
    assert relative_error(out, attention(q, q, q, causal="upper_left")[0]) <= 1e-12


@given(
    length=st.integers(1, 40),
    kernel=st.integers(1, 9),
    dilation=st.integers(1, 4),
    stride=st.integers(1, 9),
    causal=st.booleans(),
    extent=st.integers(1, 12),
    border=st.sampled_from(["shifted", "truncated"]),
)
@settings(max_examples=200, deadline=None)
def test_spans_cover_every_query_once_with_exactly_the_keys_it_sees(
    length: int, kernel: int, dilation: int, stride: int, causal: bool, extent: int, border: str
) -> None:
    if stride > kernel or (border == "shifted" and kernel * dilation > length):
        return
    axis = windows.Axis(length, kernel, dilation, stride, causal, border == "shifted")
    seen: dict[int, list[int]] = {}
    for span in windows.spans(axis, extent):
        keys = range(length)[span.keys]
        assert len(keys) == span.pattern.keys
        queries = range(length)[span.queries]
        for i, first, last in zip(queries, span.pattern.first, span.pattern.last, strict=True):
            assert i not in seen
            seen[i] = list(keys[first : last + 1])
        assert (queries[0] - keys[0]) // dilation == span.pattern.lead
    expected = [seen_along_axis(i, length, kernel, dilation, stride, causal, border) for i in range(length)]
    assert [seen[i] for i in range(length)] == expected


@given(seed=st.integers(0, 100), cell=st.integers(0, 22))
@settings(max_examples=20, deadline=None)
def test_causal_output_ignores_the_future(seed: int, cell: int) -> None:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(1, 2, 24, 4, dtype=torch.float64) for _ in range(3))
    options: Any = {"kernel_size": 5, "is_causal": True, "dilation": 2, "stride": 3}
    before = neighborhood_attention(q, k, v, **options)[0][:, :, : cell + 1]
    k[:, :, cell + 1 :], v[:, :, cell + 1 :] = 9.0, -9.0
    assert relative_error(neighborhood_attention(q, k, v, **options)[0][:, :, : cell + 1], before) <= 1e-12


def test_truncated_border_is_the_shifted_one_inside_and_sees_fewer_keys_at_the_rim() -> None:
    q, v = torch.zeros(1, 1, 9, 9, 2), torch.ones(1, 1, 9, 9, 1)
    counts = {
        border: neighborhood_attention(q, q, v, 5, border=border)[1].exp().round()[0, 0]
        for border in ("shifted", "truncated")
    }
    assert (counts["shifted"] == 25).all()
    along = torch.tensor([3.0, 4.0, 5.0, 5.0, 5.0, 5.0, 5.0, 4.0, 3.0])
    assert torch.equal(counts["truncated"], along[:, None] * along)


def test_shifting_the_grid_shifts_the_output_where_no_border_is_near() -> None:
    q, k, v = (random(1, 2, 12, 10, 4 + extra) for extra in range(3))
    k = k[..., :4]
    out = neighborhood_attention(q, k, v, 3)[0]
    moved = neighborhood_attention(*(x.roll((2, 1), (2, 3)) for x in (q, k, v)), 3)[0]  # pyright: ignore[reportCallIssue]
    assert relative_error(moved[:, :, 3:-1, 2:-1], out.roll((2, 1), (2, 3))[:, :, 3:-1, 2:-1]) <= 1e-12


@pytest.mark.parametrize("kernel", [(3, 4), (5, 2)])
def test_bias_of_relative_positions_reaches_every_entry_under_the_shifted_border(kernel: tuple[int, int]) -> None:
    q = random(1, 2, 6, 6, 4)
    rpb = torch.zeros(2, *(2 * size - 1 for size in kernel), dtype=torch.float64, requires_grad=True)
    neighborhood_attention(q, q, q, kernel, rpb=rpb)[1].sum().backward()
    assert rpb.grad is not None
    assert (rpb.grad > 0).all()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # of natten and of flex_attention, about their own arguments
@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((40,), {"kernel_size": 6, "dilation": 3}),
        ((41,), {"kernel_size": 5, "stride": 3, "dilation": 2}),
        ((41,), {"kernel_size": 5, "is_causal": True, "dilation": 2, "stride": 2}),
        ((12, 11), {"kernel_size": (5, 4), "dilation": (2, 1), "stride": (2, 3)}),
        ((6, 7, 8), {"kernel_size": (3, 2, 5), "dilation": (1, 3, 1), "is_causal": (False, True, False)}),
    ],
)
def test_equals_natten(grid: tuple[int, ...], options: dict[str, Any]) -> None:
    functional = pytest.importorskip("natten.functional")
    q, k, v = (torch.randn(2, *grid, 2, 16, generator=torch.Generator().manual_seed(i)) for i in range(3))
    peer, peer_lse = functional.neighborhood_attention_generic(q, k, v, return_lse=True, backend="flex-fna", **options)
    out, lse = neighborhood_attention(*(x.movedim(-2, 1) for x in (q, k, v)), **options)  # pyright: ignore[reportArgumentType]
    assert relative_error(out.movedim(1, -2), peer) <= 2e-5
    assert relative_error(lse.movedim(1, -1), peer_lse) <= 2e-5


def test_lse_merges_a_window_split_into_two_borders() -> None:
    """exp(lse) counts the keys when all logits are 0, the dead row included nowhere: every query sees itself."""
    q = torch.zeros(1, 1, 7, 2)
    lse = neighborhood_attention(q, q, q, 4, border="truncated")[1]
    assert relative_error(lse.exp()[0, 0], torch.tensor([2.0, 3.0, 4.0, 4.0, 4.0, 4.0, 3.0])) <= 1e-5
    assert lse.isfinite().all()
    assert math.isclose(float(lse[0, 0, 3]), math.log(4), rel_tol=1e-6)


def make(**replaced: object) -> dict[str, Any]:
    x = torch.zeros(2, 4, 9, 7, 8)
    return {"q": x, "k": x, "v": torch.zeros(2, 4, 9, 7, 5), "kernel_size": 3, **replaced}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(4, 6, 8)}, r"attention: q must have 4, 5 or 6 dimensions \(B H \*space D\), got shape"),
        ({"q": torch.zeros(2, 4, 9, 7, 8).int()}, "neighborhood_attention: q must be one of float64, float32"),
        ({"k": torch.zeros(2, 4, 9, 8)}, r"k must have the dimensions of q, got shape \(2, 4, 9, 8\)"),
        ({"k": torch.zeros(2, 4, 9, 7, 6)}, r"k must have size 8 along dimension 4 \(the width of q\)"),
        ({"v": torch.zeros(1, 4, 9, 7, 5)}, r"v must have size 2 along dimension 0 \(the batch of q\)"),
        ({"v": torch.zeros(2, 2, 9, 7, 5)}, r"v must have size 4 along dimension 1 \(the heads of q\)"),
        ({"v": torch.zeros(2, 4, 8, 7, 5)}, r"v must have size 9 along dimension 2 \(the grid of q\)"),
        ({"v": torch.zeros(2, 4, 9, 7, 5).half()}, r"v must have the dtype of q \(torch.float32\)"),
        ({"k": torch.zeros(2, 4, 9, 7, 8, device="meta")}, r"k must be on the device of q \(cpu\), got k on meta"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size must be one value or one for each of the 2 axes, got kernel_size="),
        ({"kernel_size": 0}, "kernel_size must be at least 1, got kernel_size=0"),
        ({"dilation": (1, 0)}, "dilation must be at least 1, got dilation=0"),
        ({"stride": 4}, "stride must not exceed kernel_size=3 along axis 0, got stride=4"),
        (
            {"kernel_size": (3, 4), "dilation": 2},
            "kernel_size · dilation must not exceed the 7 cells of axis 1 .* kernel_size=4 and dilation=2; "
            "use kernel_size<=3",
        ),
        ({"border": "zero"}, "border must be one of 'shifted', 'truncated', got border='zero'"),
        ({"rpb": torch.zeros(4, 5, 6)}, r"rpb must have shape \(4, 5, 5\) \(H, 2·kernel_size − 1\), got \(4, 5, 6\)"),
        ({"rpb": torch.zeros(4, 5, 5), "stride": 2}, "stride must be 1 when rpb is given, got stride=2"),
        (
            {name: torch.zeros(2, 4, 0, 7, 8) for name in "qkv"},
            r"q must have at least one cell along every axis, got shape \(2, 4, 0, 7, 8\)",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        neighborhood_attention(**make(**changes))
