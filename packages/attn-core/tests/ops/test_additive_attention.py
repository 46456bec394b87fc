"""additive_attention: the equation by loops, a pointer decoder, its properties, and every message."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from attn_core import additive_attention
from attn_core.ops.additive_attention import torch_backend
from attn_core.testing import TOLERANCE, Case, cases_of, gradients, leaves, relative_error


def by_loops(
    q: Tensor, k: Tensor, w: Tensor, value: Tensor | None = None, key_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One pair at a time, numbers only."""
    B, N, D = q.shape
    M = k.shape[1]
    scores, lse = q.new_full((B, N, M), -math.inf), q.new_full((B, N), -math.inf)
    out = q.new_zeros(B, N, 0 if value is None else value.shape[2])
    for b in range(B):
        for i in range(N):
            for j in range(M):
                if key_mask is None or key_mask[min(b, len(key_mask) - 1), j]:
                    scores[b, i, j] = sum(
                        float(w[d]) * math.tanh(float(q[b, i, d]) + float(k[b, j, d])) for d in range(D)
                    )
            seen = [j for j in range(M) if scores[b, i, j] != -math.inf]
            total = sum(math.exp(float(scores[b, i, j])) for j in seen)
            if seen:
                lse[b, i] = math.log(total)
            if value is not None:
                for j in seen:
                    out[b, i] += math.exp(float(scores[b, i, j])) / total * value[b, j]
    return (scores if value is None else out), lse


@pytest.mark.parametrize("case", [c for c in cases_of("additive_attention") if "tiles" not in c.name], ids=str)
def test_reference_equals_the_equation_by_loops(case: Case) -> None:
    args, kwargs = case.inputs(torch.float64)
    with torch.no_grad():
        expected = by_loops(*args, **kwargs)
        actual = additive_attention(*args, **kwargs, backend="reference")
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) <= TOLERANCE[torch.float64]


def test_equals_a_pointer_networks_log_probabilities() -> None:
    """u_j = vᵀ tanh(W₁ e_j + W₂ d_i), softmax over the inputs that are not yet chosen."""
    width = 12
    to_key, to_query, v = (nn.Linear(width, n, bias=False).double() for n in (width, width, 1))
    encoded, decoded = torch.randn(2, 9, width).double(), torch.randn(2, 4, width).double()
    chosen = torch.rand(2, 9) > 0.7
    logits = v(torch.tanh(to_key(encoded)[:, None] + to_query(decoded)[:, :, None])).squeeze(-1)
    expected = logits.masked_fill(chosen[:, None], -math.inf).log_softmax(-1)
    scores, lse = additive_attention(to_query(decoded), to_key(encoded), v.weight[0], key_mask=~chosen)
    assert relative_error(scores - lse[..., None], expected) <= 1e-12


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


lengths = st.integers(1, 30)


@settings(deadline=None, max_examples=25)
@given(n=lengths, m=lengths, d=st.integers(1, 20), seed=st.integers(0, 1000))
def test_permuting_the_keys_permutes_scores_and_leaves_the_pool(n: int, m: int, d: int, seed: int) -> None:
    q, k, w, value = random(1, n, d), random(1, m, d, seed=1), random(d, seed=2), random(1, m, 3, seed=3)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    scores, lse = additive_attention(q, k, w)
    permuted, same_lse = additive_attention(q, k[:, order], w)
    assert relative_error(permuted, scores[..., order]) <= 1e-10
    assert relative_error(same_lse, lse) <= 1e-10
    pooled = additive_attention(q, k, w, value)[0]
    assert relative_error(additive_attention(q, k[:, order], w, value[:, order])[0], pooled) <= 1e-10


@settings(deadline=None, max_examples=15)
@given(parts=st.lists(st.integers(1, 20), min_size=1, max_size=4))
def test_key_sets_merge_exactly_through_lse(parts: list[int]) -> None:
    q, k, w, value = random(1, 5, 4), random(1, sum(parts), 4, seed=1), random(4, seed=2), random(1, sum(parts), 3)
    pieces = [
        additive_attention(q, kv[0], w, kv[1]) for kv in zip(k.split(parts, 1), value.split(parts, 1), strict=True)
    ]
    outs, lses = (torch.stack(x) for x in zip(*pieces, strict=True))
    weight = (lses - lses.logsumexp(0)).exp()[..., None]
    expected_out, expected_lse = additive_attention(q, k, w, value)
    assert relative_error((outs * weight).sum(0), expected_out) <= 1e-10
    assert relative_error(lses.logsumexp(0), expected_lse) <= 1e-10


@pytest.mark.parametrize("name", ["scores", "value", "masked values with a dead entry"])
def test_the_tile_size_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (case,) = (c for c in cases_of("additive_attention") if c.name == name)
    args, kwargs = case.inputs(torch.float64)

    def step() -> list[Tensor]:
        outputs = additive_attention(*args, **kwargs, backend="torch")
        return [*outputs, *gradients(outputs, leaves(args, kwargs))]

    whole = step()
    monkeypatch.setattr(torch_backend, "TILE", 50)
    monkeypatch.setattr(torch_backend, "CHUNK_SCORES", 14)
    for actual, expected in zip(step(), whole, strict=True):
        assert relative_error(actual, expected) <= 1e-12


def test_a_batch_equals_its_entries_one_by_one() -> None:
    q, k, w = random(3, 4, 8), random(3, 6, 8, seed=1), random(8, seed=2)
    pieces = torch.cat([additive_attention(q[i : i + 1], k[i : i + 1], w)[0] for i in range(3)])
    assert relative_error(additive_attention(q, k, w)[0], pieces) <= 1e-12


def test_a_saturated_sum_is_finite_and_has_no_gradient() -> None:
    q = torch.full((1, 1, 2), 1e30, requires_grad=True)
    scores, _ = additive_attention(q, torch.full((1, 2, 2), 1e30), torch.ones(2))
    scores.sum().backward()
    assert torch.equal(scores, torch.full((1, 1, 2), 2.0))
    assert q.grad is not None
    assert not q.grad.any()


def make(**replaced: object) -> dict[str, object]:
    return {"q": torch.zeros(2, 6, 8), "k": torch.zeros(2, 9, 8), "w": torch.zeros(8), **replaced}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(6, 8)}, r"additive_attention: q must have 3 dimensions \(B N D\), got shape \(6, 8\)"),
        ({"q": torch.zeros(2, 6, 8).long()}, "q must be one of float64, float32, bfloat16, float16"),
        ({"k": torch.zeros(9, 8)}, r"k must have 3 dimensions \(B M D\)"),
        ({"k": torch.zeros(1, 9, 8)}, r"k must have size 2 along dimension 0 \(the batch of q\)"),
        ({"k": torch.zeros(2, 9, 7)}, r"k must have size 8 along dimension 2 \(the width of q\)"),
        ({"k": torch.zeros(2, 9, 8).half()}, r"k must have the dtype of q \(torch.float32\)"),
        ({"w": torch.zeros(1, 8)}, r"w must have 1 dimensions \(D\)"),
        ({"w": torch.zeros(7)}, r"w must have size 8 along dimension 0 \(the width of q\)"),
        ({"value": torch.zeros(9, 8)}, r"value must have 3 dimensions \(B M E\)"),
        ({"value": torch.zeros(1, 9, 4)}, r"value must have size 2 along dimension 0 \(the batch of q\)"),
        ({"value": torch.zeros(2, 8, 4)}, r"value must have size 9 along dimension 1 \(the tokens of k\)"),
        ({"key_mask": torch.zeros(2, 9)}, "key_mask must be one of bool, got key_mask.dtype=torch.float32"),
        ({"key_mask": torch.zeros(2, 8, dtype=torch.bool)}, r"key_mask must broadcast to B M = \(2, 9\)"),
        (
            {"key_mask": torch.zeros(2, 9, dtype=torch.bool, device="meta")},
            r"key_mask must be on the device of q \(cpu\), got key_mask on meta",
        ),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        additive_attention(**make(**changes))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("pooled", [False, True])
def test_entries_of_a_batch_that_share_a_tile_equal_entries_alone(
    pooled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, w = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((5, 3, 4), (5, 6, 4), (4,)))
    value = torch.randn(5, 6, 2, dtype=torch.float64, requires_grad=True) if pooled else None
    mask = torch.rand(5, 6) < 0.7
    inputs = [x for x in (q, k, w, value) if x is not None]
    results = []
    for tile in (torch_backend.TILE, 16):  # all five entries at once; several tiles for each entry
        monkeypatch.setattr(torch_backend, "TILE", tile)
        out, lse = additive_attention(q, k, w, value, key_mask=mask, backend="torch")
        seen = [x.masked_fill(x == -math.inf, 0.0) for x in (out, lse)]
        results.append([*seen, *torch.autograd.grad(seen[0].sin().sum() + seen[1].cos().sum(), inputs)])
    for together, alone in zip(*results, strict=True):
        assert relative_error(together, alone) <= TOLERANCE[torch.float64]
