"""scatterbrain against the N×M matrix of exact and estimated exponentials."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_core import attention, local_stride_table, scatterbrain, window_index
from attn_core.testing import TOLERANCE, relative_error


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def seen_keys(queries: int, keys: int, q_index: Tensor, kv_index: Tensor, table: Tensor | None, heads: int) -> Tensor:
    """(heads, N, M): whether a query reads a key, by loops over the blocks."""
    seen = torch.zeros(heads, queries, keys, dtype=torch.bool)
    for h in range(heads):
        for r, rows in enumerate(q_index[0, h % q_index.shape[1]].tolist()):
            blocks = [r] if table is None else table[0, h % table.shape[1], r].tolist()
            columns = [j for c in blocks if c >= 0 for j in kv_index[0, h % kv_index.shape[1], c].tolist() if j >= 0]
            for i in rows:
                if i >= 0:
                    seen[h, i, columns] = True
    return seen


def definition(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, seen: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Exact exponentials where ``seen``, products of features elsewhere, in plain numbers."""

    def features(x: Tensor) -> Tensor:
        projected = math.sqrt(scale) * x @ projection.T
        both = torch.cat([projected, -projected], -1)
        return torch.exp(both - scale * x.square().sum(-1, keepdim=True) / 2) / math.sqrt(both.shape[-1])

    matrix = torch.where(seen, torch.exp(q @ k.mT * scale), features(q) @ features(k).mT)
    total = matrix.sum(-1, keepdim=True)
    return matrix / total @ v, total.log().squeeze(-1)


def blocks(case: str) -> tuple[Tensor, Tensor, Tensor | None]:
    index = window_index(1, 24, (1, 4))
    if case == "own block":
        return index, index, None
    if case == "band and stride":
        return index, index, local_stride_table(6, 1, 3, 3, causal=False)
    if case == "heads differ":
        return index, index, local_stride_table(6, 2, 2, 3)
    holes = index.clone()
    holes[..., 2, :] = -1
    holes[..., 4, 1:3] = -1
    return holes, holes, None


@pytest.mark.parametrize("case", ["own block", "band and stride", "heads differ", "holes"])
def test_output_and_gradients_equal_the_matrix(case: str) -> None:
    q_index, kv_index, table = blocks(case)
    q, k = (random(2, 3, 24, 8, seed=s).requires_grad_() for s in range(2))
    v, projection = random(2, 3, 24, 5, seed=3).requires_grad_(), random(6, 8, seed=4).requires_grad_()
    inputs = (q, k, v, projection)
    seen = seen_keys(24, 24, q_index, kv_index, table, 3)
    expected = definition(*inputs, seen, 0.4)
    actual = scatterbrain(*inputs, q_index, kv_index, table, scale=0.4)
    for a, b in zip(actual, expected, strict=True):
        assert relative_error(a, b) <= 1e-10
    losses = [(out * random(*out.shape, seed=5)).sum() + lse.sin().sum() for out, lse in (actual, expected)]
    for got, want in zip(*(torch.autograd.grad(loss, inputs) for loss in losses), strict=True):
        assert relative_error(got, want) <= 2e-10


def test_all_blocks_listed_is_softmax_attention_whatever_the_features() -> None:
    q, k, v = random(1, 2, 12, 8), random(1, 2, 12, 8, seed=1), random(1, 2, 12, 8, seed=2)
    index = window_index(1, 12, (1, 4))
    everything = torch.arange(3).expand(1, 1, 3, 3)
    out, lse = scatterbrain(q, k, v, random(4, 8, seed=3), index, index, everything)
    expected, expected_lse = attention(q, k, v)
    assert relative_error(out, expected) <= 1e-10
    assert relative_error(lse, expected_lse) <= 1e-10


def test_many_features_approach_softmax_attention() -> None:
    q, k, v = (random(1, 1, 32, 4, seed=s) / 2 for s in range(3))
    index = window_index(1, 32, (1, 4))
    expected, _ = attention(q, k, v)
    errors = [
        float((scatterbrain(q, k, v, random(count, 4, seed=9), index, index)[0] - expected).square().mean().sqrt())
        for count in (4, 40000)
    ]
    assert errors[1] < 0.05 * errors[0], errors


def test_large_logits_do_not_overflow() -> None:
    q, k, v = (60 * random(1, 2, 16, 8, seed=s).float() for s in range(3))
    index = window_index(1, 16, (1, 4))
    out, lse = scatterbrain(q, k, v, random(6, 8, seed=4).float(), index, index)
    assert bool(out.isfinite().all())
    assert bool(lse.isfinite().all())


def test_an_empty_batch_gives_an_empty_result() -> None:
    empty, index = torch.zeros(0, 2, 8, 4), window_index(1, 8, (1, 4))
    out, lse = scatterbrain(empty, empty, empty, torch.ones(3, 4), index, index)
    assert out.shape == (0, 2, 8, 4)
    assert lse.shape == (0, 2, 8)


def test_autocast_runs_in_its_dtype() -> None:
    q, k, v = (random(1, 2, 12, 4, seed=s).float() for s in range(3))
    index = window_index(1, 12, (1, 4))
    expected = scatterbrain(q, k, v, random(3, 4, seed=3).float(), index, index)[0]
    with torch.autocast("cpu", torch.bfloat16):
        actual = scatterbrain(q, k, v, random(3, 4, seed=3).float(), index, index)[0]
    assert actual.dtype == torch.bfloat16
    assert relative_error(actual, expected) <= TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(2, 8, 4)}, r"scatterbrain: q must have 4 dimensions \(B H N D\)"),
        ({"k": torch.zeros(2, 8, 4)}, r"k must have 4 dimensions \(B H M D\)"),
        ({"k": torch.zeros(1, 1, 8, 4)}, r"k must have size 2 along dimension 1 \(the heads of q\)"),
        ({"projection": torch.zeros(1, 3, 4)}, r"projection must have 2 dimensions \(F D\)"),
        ({"projection": torch.zeros(3, 5)}, r"projection must have size 4 along dimension 1 \(the width of q\)"),
        ({"projection": torch.zeros(3, 4).double()}, r"projection must have the dtype of q \(torch.float32\)"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    index = window_index(1, 8, (1, 4))
    given: dict[str, Any] = {name: torch.zeros(1, 2, 8, 4) for name in "qkv"}
    with pytest.raises(ValueError, match=message):
        scatterbrain(**{**given, "projection": torch.zeros(3, 4), **changes}, q_index=index, kv_index=index)
