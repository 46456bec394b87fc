"""linear_attention: the recurrence step by step, its properties, and every message."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_core import linear_attention
from attn_core.testing import relative_error


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def operands(tokens: int, batch: int = 1, heads: int = 2, width: int = 4, value_width: int = 3) -> list[Tensor]:
    widths = (width, width, value_width)
    return [random(batch, heads, tokens, size, seed=i) for i, size in enumerate(widths)]


def by_steps(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token at a time: S ← λS + k vᵀ, out = qᵀS."""
    outs = []
    for i in range(q.shape[2]):
        state = decay.exp()[:, None, None] * state + k[:, :, i, :, None] * v[:, :, i, None, :]
        outs.append(torch.einsum("bhd,bhdc->bhc", q[:, :, i], state))
    return torch.stack(outs, 2), state


log_decays = st.sampled_from([0.0, -1e-3, -0.3, -5.0, -90.0])


@settings(deadline=None, max_examples=25)
@given(n=st.integers(1, 40), chunk=st.integers(1, 16), first=log_decays, second=log_decays)
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_equals_the_recurrence(backend: str, n: int, chunk: int, first: float, second: float) -> None:
    q, k, v = operands(n)
    decay, start = torch.tensor([first, second], dtype=torch.float64), random(1, 2, 4, 3, seed=5)
    expected = by_steps(q, k, v, decay, start)
    actual = linear_attention(q, k, v, log_decay=decay, initial_state=start, chunk_size=chunk, backend=backend)  # pyright: ignore[reportArgumentType]
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) <= 1e-10


@settings(deadline=None, max_examples=20)
@given(parts=st.lists(st.integers(0, 12), min_size=1, max_size=4))
def test_pieces_joined_by_their_state_equal_the_whole(parts: list[int]) -> None:
    q, k, v = operands(sum(parts))
    decay = torch.tensor([-0.2, -0.7], dtype=torch.float64)
    expected, final = linear_attention(q, k, v, log_decay=decay, chunk_size=5)
    outs, state = [], None
    for piece in zip(*(x.split(parts, 2) for x in (q, k, v)), strict=True):
        out, state = linear_attention(*piece, log_decay=decay, initial_state=state, chunk_size=5)
        outs.append(out)
    assert state is not None
    assert relative_error(torch.cat(outs, 2), expected) <= 1e-10
    assert relative_error(state, final) <= 1e-10


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 40), cut=st.integers(0, 39))
def test_the_future_has_no_influence(n: int, cut: int) -> None:
    q, k, v = operands(n)
    cut = min(cut, n - 1)
    changed = [x.clone() for x in (q, k, v)]
    for x in changed:
        x[:, :, cut + 1 :] += 5
    first, second = (linear_attention(*x, chunk_size=8)[0][:, :, : cut + 1] for x in ((q, k, v), changed))
    assert relative_error(first, second) <= 1e-12


@settings(deadline=None, max_examples=20)
@given(n=st.integers(1, 30), seed=st.integers(0, 100))
def test_without_order_permuting_the_keys_changes_nothing(n: int, seed: int) -> None:
    q, k, v = operands(n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    expected = linear_attention(q, k, v, causal=False)
    actual = linear_attention(q, k[:, :, order], v[:, :, order], causal=False)
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) <= 1e-10


def test_both_ways_with_decay_is_symmetric_in_time() -> None:
    q, k, v = operands(23)
    decay = torch.tensor([-0.1, -2.0], dtype=torch.float64)
    out, _ = linear_attention(q, k, v, log_decay=decay, causal=False, chunk_size=7)
    mirrored, _ = linear_attention(*(x.flip(2) for x in (q, k, v)), log_decay=decay, causal=False, chunk_size=7)
    assert relative_error(out, mirrored.flip(2)) <= 1e-10


def test_normalized_rows_of_positive_features_average_the_values() -> None:
    q, k, v = (x.abs() for x in operands(19))
    out, _ = linear_attention(q, k, torch.ones_like(v), normalize=True, log_decay=torch.tensor([-0.3, -0.1]).double())
    assert relative_error(out, torch.ones_like(out)) <= 1e-12


def test_a_column_of_ones_in_v_is_the_denominator_that_a_state_keeps() -> None:
    q, k, v = (x.abs() for x in operands(19))
    expected, _ = linear_attention(q, k, v, normalize=True, eps=1e-3, scale=0.5)
    wide = torch.cat([v, torch.ones_like(v[..., :1])], dim=-1)
    first, state = linear_attention(q[:, :, :8], k[:, :, :8], wide[:, :, :8], scale=0.5)
    second, _ = linear_attention(q[:, :, 8:], k[:, :, 8:], wide[:, :, 8:], scale=0.5, initial_state=state)
    raw = torch.cat([first, second], dim=2)
    assert relative_error(raw[..., :-1] / (raw[..., -1:] + 1e-3), expected) <= 1e-12


def test_a_decay_whose_powers_vanish_within_a_chunk_gives_no_infinity() -> None:
    """λ^128 of the steepest lightning head is 1e-47: dividing by it would overflow float32."""
    q, k, v = (x.float().requires_grad_() for x in operands(300))
    decay = torch.tensor([-0.84, -8.0], requires_grad=True)
    out, state = linear_attention(q, k, v, log_decay=decay, chunk_size=128)
    grads = torch.autograd.grad(out.sum() + state.sum(), (q, k, v, decay))
    assert all(bool(x.isfinite().all()) for x in (out, state, *grads))


def test_gradient_of_the_decay_holds_over_a_long_sequence_in_float32() -> None:
    q, k, v = (random(1, 2, 4000, 8, seed=i) for i in range(3))
    grads = []
    for dtype in (torch.float64, torch.float32):
        decay = torch.tensor([-0.01, -0.5], dtype=dtype, requires_grad=True)
        out, _ = linear_attention(*(x.to(dtype) for x in (q, k, v)), log_decay=decay)
        grads.append(torch.autograd.grad((out * torch.linspace(-1, 1, 4000, dtype=dtype)[:, None]).sum(), decay)[0])
    assert relative_error(grads[1], grads[0]) <= 4e-5


@pytest.mark.parity
def test_equals_flash_linear_attentions_simple_gla() -> None:
    naive = pytest.importorskip("fla.ops.simple_gla.naive")
    q, k, v = (x.float() for x in operands(70, value_width=4))
    decay, start = torch.tensor([-0.1, -0.9]), random(1, 2, 4, 4, seed=7).float()
    expected, final = naive.naive_recurrent_simple_gla(
        *(x.transpose(1, 2) for x in (q, k, v)), decay.expand(1, 70, 2), scale=0.3, initial_state=start
    )
    out, state = linear_attention(q, k, v, log_decay=decay, scale=0.3, initial_state=start)
    assert relative_error(out, expected.transpose(1, 2)) <= 2e-5
    assert relative_error(state, final) <= 2e-5


def make(**replaced: object) -> dict[str, object]:
    return {"q": torch.zeros(2, 4, 6, 8), "k": torch.zeros(2, 4, 6, 8), "v": torch.zeros(2, 4, 6, 5), **replaced}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(4, 6, 8)}, r"linear_attention: q must have 4 dimensions \(B H N D\)"),
        ({"k": torch.zeros(4, 6, 8)}, r"k must have 4 dimensions \(B H M D\)"),
        ({"v": torch.zeros(4, 6, 8)}, r"v must have 4 dimensions \(B H M Dv\)"),
        ({"q": torch.zeros(2, 4, 6, 8).long()}, "q must be one of float64, float32"),
        ({"k": torch.zeros(1, 4, 6, 8)}, r"k must have size 2 along dimension 0 \(the batch of q\)"),
        ({"k": torch.zeros(2, 2, 6, 8)}, r"k must have size 4 along dimension 1 \(the heads of q\)"),
        ({"k": torch.zeros(2, 4, 6, 7)}, r"k must have size 8 along dimension 3 \(the width of q\)"),
        (
            {"k": torch.zeros(2, 4, 7, 8)},
            r"k must have size 6 along dimension 2 \(the tokens of q, since causal=True\)",
        ),
        ({"v": torch.zeros(2, 4, 7, 5)}, r"v must have size 6 along dimension 2 \(the tokens of k\)"),
        ({"v": torch.zeros(2, 4, 6, 5).half()}, r"v must have the dtype of q \(torch.float32\)"),
        ({"v": torch.zeros(2, 4, 6, 5, device="meta")}, r"v must be on the device of q \(cpu\), got v on meta"),
        ({"log_decay": torch.zeros(4, device="meta")}, r"log_decay must be on the device of q \(cpu\)"),
        ({"log_decay": torch.zeros(4).half()}, "log_decay must be one of float32, got log_decay.dtype=torch.float16"),
        ({"log_decay": torch.zeros(2, 4)}, r"log_decay must have 1 dimensions \(H\)"),
        ({"log_decay": torch.zeros(3)}, r"log_decay must have size 4 along dimension 0 \(the heads of q\)"),
        ({"initial_state": torch.zeros(2, 4, 8, 5).double()}, "initial_state must be one of float32"),
        ({"initial_state": torch.zeros(4, 8, 5)}, r"initial_state must have 4 dimensions \(B H D Dv\)"),
        ({"initial_state": torch.zeros(2, 4, 5, 8)}, r"initial_state must have size 8 along dimension 2"),
        ({"initial_state": torch.zeros(2, 4, 8, 5), "normalize": True}, "normalize must be False with initial_state"),
        ({"chunk_size": 0}, "linear_attention: chunk_size must be at least 1, got chunk_size=0"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear_attention(**make(**changes))  # pyright: ignore[reportArgumentType]


def test_zero_scale_is_not_taken_for_the_default() -> None:
    q, k, v = operands(5)
    out, state = linear_attention(q, k, v, scale=0.0)
    assert torch.equal(out, torch.zeros_like(out))
    assert math.isfinite(float(state.sum()))
    assert float(state.abs().sum()) > 0
