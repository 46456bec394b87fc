"""routed_heads: every way of leaving pairs out equals computing all of them; what is off is not computed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from attn_core import routed_heads
from attn_core.composites import routed_heads as ways
from attn_core.testing import relative_error

Way = Callable[[Tensor, Tensor, Tensor, Tensor, float | None, Tensor | None], Tensor]


def blocks(q: Tensor, k: Tensor, v: Tensor, gates: Tensor, scale: float | None, _: Tensor | None) -> Tensor:
    return ways.in_blocks(q, k, v, gates, scale, (gates != 0).transpose(1, 2))


def inputs(share: float, key_heads: int = 6, tokens: int = 70, *, biased: bool = True) -> list[Tensor | None]:
    """Two heads that are always on, one that never is, and the rest at random."""
    q = torch.randn(2, tokens, 6, 8, dtype=torch.float64).transpose(1, 2)
    k, v = (torch.randn(2, key_heads, 40, width, dtype=torch.float64) for width in (8, 5))
    gates = torch.rand(2, tokens, 6, dtype=torch.float64) + 0.5
    gates = gates * (torch.rand_like(gates) < share)
    gates[:, :, :2] += 0.1
    gates[:, :, 4] = 0
    bias = torch.randn(1, 6, tokens, 40, dtype=torch.float64) if biased else None
    return [None if x is None else x.requires_grad_() for x in (q, k, v, gates, bias)]


@pytest.mark.parametrize("key_heads", [6, 3])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("way", [ways.skipped, blocks], ids=["one by one", "blocks"])
def test_leaving_pairs_out_changes_neither_output_nor_gradient(way: Way, share: float, key_heads: int) -> None:
    q, k, v, gates, bias = tensors = inputs(share, key_heads, biased=way is ways.skipped)
    assert q is not None
    assert k is not None
    assert v is not None
    assert gates is not None
    wanted = [x for x in tensors if x is not None]
    weight = torch.randn(2, 6, 70, 5, dtype=torch.float64)
    results = []
    for function in (way, ways.masked):
        out = function(q, k, v, gates, 0.3, bias)
        results.append([out, *torch.autograd.grad((out * weight).sum(), wanted)])
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) <= 1e-12
    assert not results[0][4][gates == 0].any()
    assert not results[0][0][:, 4].any()


def test_pairs_that_are_off_are_not_computed() -> None:
    """Not-a-number in their queries would reach the result and the keys' gradients through any product."""
    q, k, v = (torch.randn(1, 3, 1000, 8, requires_grad=True) for _ in range(3))
    gates = torch.ones(1, 1000, 3)
    gates[:, ::2, 1:] = 0
    poisoned = q.detach().masked_fill((gates == 0).transpose(1, 2)[..., None], torch.nan).requires_grad_()
    out = routed_heads(poisoned, k, v, gates)
    assert relative_error(out, routed_heads(q, k, v, gates)) <= 1e-6
    grads = torch.autograd.grad(out.square().sum(), [poisoned, k, v])
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_memory_of_pairs_that_are_on_alone() -> None:
    """Queries that are on are copied once; scores (1,000 × 1,000 a head) are never held."""
    from attn_core.testing import peak_memory

    q, k, v = (torch.randn(1, 4, 1000, 32) for _ in range(3))
    gates = (torch.arange(4) < 2).float().expand(1, 1000, 4).contiguous()
    assert peak_memory(lambda: routed_heads(q, k, v, gates)) < 4 * 1000 * 1000 * 4 / 4


def test_a_traced_call_computes_all_pairs_and_gives_the_same() -> None:
    q, k, v = (torch.randn(1, 3, 800, 8) for _ in range(3))
    gates = (torch.rand(1, 800, 3) < 0.5).float()
    expected = routed_heads(q, k, v, gates)
    mapped = torch.vmap(routed_heads)(*(x[None] for x in (q, k, v, gates)))[0]
    assert relative_error(mapped, expected) <= 1e-6


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ((2, 6), r"routed_heads: gates must have 3 dimensions \(B N H\), got shape \(2, 6\)"),
        ((1, 6, 4), r"gates must have size 2 along dimension 0 \(the batch of q\)"),
        ((2, 4, 6), r"gates must have size 6 along dimension 1 \(the tokens of q\)"),
        ((2, 6, 2), r"gates must have size 4 along dimension 2 \(its heads\)"),
    ],
)
def test_wrong_gates_are_named(gates: tuple[int, ...], message: str) -> None:
    q = torch.zeros(2, 4, 6, 8)
    with pytest.raises(ValueError, match=message):
        routed_heads(q, q, q, torch.zeros(gates))


def test_heads_of_the_keys_divide_those_of_the_queries() -> None:
    q, k = torch.zeros(2, 4, 6, 8), torch.zeros(2, 3, 6, 8)
    with pytest.raises(ValueError, match=r"routed_heads: k must have heads that divide those of q \(4\), got k="):
        routed_heads(q, k, k, torch.zeros(2, 6, 4))
