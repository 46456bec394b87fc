"""agent_attention against two softmaxes in full."""

import pytest
import torch
from torch import Tensor

from attn_core import agent_attention
from attn_core.testing import relative_error


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def definition(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, agent_bias: Tensor, query_bias: Tensor, scale: float
) -> Tensor:
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    collected = (agents @ k.mT * scale + agent_bias).softmax(-1) @ v
    return (q @ agents.mT * scale + query_bias).softmax(-1) @ collected


@pytest.mark.parametrize(
    ("tokens", "agents", "value_width", "key_heads"), [(7, 3, 8, 4), (50, 9, 5, 2), (1, 1, 8, 1), (13, 17, 8, 4)]
)
def test_output_and_gradients_equal_two_softmaxes(tokens: int, agents: int, value_width: int, key_heads: int) -> None:
    q, a = random(2, 4, tokens, 8), random(2, 4, agents, 8, seed=1)
    k, v = random(2, key_heads, tokens, 8, seed=2), random(2, key_heads, tokens, value_width, seed=3)
    biases = random(1, 4, agents, tokens, seed=4), random(1, 4, tokens, agents, seed=5)
    inputs = (q, k, v, a, *biases)
    expected = definition(*inputs, scale=0.3)
    actual = agent_attention(q, k, v, a, agent_bias=biases[0], query_bias=biases[1], scale=0.3)
    assert relative_error(actual, expected) <= 1e-10
    weight = torch.randn_like(expected)
    for got, want in zip(
        torch.autograd.grad((actual * weight).sum(), inputs),
        torch.autograd.grad((expected * weight).sum(), inputs),
        strict=True,
    ):
        assert relative_error(got, want) <= 2e-10


def test_the_default_scale_is_that_of_the_head_width() -> None:
    q, k, v, a = random(1, 2, 5, 16), random(1, 2, 6, 16), random(1, 2, 6, 4), random(1, 2, 3, 16)
    assert torch.equal(agent_attention(q, k, v, a), agent_attention(q, k, v, a, scale=0.25))


def test_hidden_keys_have_no_influence() -> None:
    q, k, v, a = random(1, 2, 5, 8), random(1, 2, 6, 8), random(1, 2, 6, 4), random(1, 2, 3, 8)
    visible = torch.tensor([[True, True, False, True, True, False]])
    expected = agent_attention(q, k[:, :, visible[0]], v[:, :, visible[0]], a)
    assert relative_error(agent_attention(q, k, v, a, key_mask=visible), expected) <= 1e-12


@pytest.mark.parametrize(
    ("q", "agents", "message"),
    [
        ((2, 4, 6), (2, 4, 3, 8), r"agent_attention: q must have 4 dimensions \(B H N D\), got shape \(2, 4, 6\)"),
        ((2, 4, 6, 8), (2, 3, 8), r"agents must have 4 dimensions \(B H A D\)"),
        ((2, 4, 6, 8), (1, 4, 3, 8), r"agents must have size 2 along dimension 0 \(the batch of q\)"),
        ((2, 4, 6, 8), (2, 2, 3, 8), r"agents must have size 4 along dimension 1 \(the heads of q\)"),
        ((2, 4, 6, 8), (2, 4, 3, 7), r"agents must have size 8 along dimension 3 \(the width of q\)"),
    ],
)
def test_bad_arguments_are_named(q: tuple[int, ...], agents: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        agent_attention(torch.zeros(q), torch.zeros(2, 4, 9, 8), torch.zeros(2, 4, 9, 8), torch.zeros(agents))
