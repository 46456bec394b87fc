"""Gates of a mixture of heads against the equations one token at a time, and what balance is collected of a network."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from attn_core.nn import HeadRouter, balance_losses

KINDS = [(2, 3), (1, 2), (0, 4), (4, 2), (6, 0), (1, 0)]


def router(shared: int, routed: int, dim: int = 5) -> HeadRouter:
    heads = 6 if routed else shared
    net = HeadRouter(dim, heads, shared, routed, dtype=torch.float64)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


def gates_of(token: Tensor, net: HeadRouter) -> Tensor:
    """Equations 3 to 5 with the factors of the code, for one token."""
    S, K = net.num_shared, net.num_routed
    ours = torch.ones(S, dtype=torch.float64) if net.wg_1 is None else S * torch.softmax(net.wg_1.weight @ token, 0)
    if net.wg is None:
        return ours
    p = torch.softmax(net.wg.weight @ token, 0)
    best = sorted(range(len(p)), key=lambda e: -p[e].item())[:K]
    total = torch.stack([p[e] for e in best]).sum()
    theirs = torch.stack([K * p[e] / total if e in best else torch.zeros((), dtype=p.dtype) for e in range(len(p))])
    if net.wg_0 is None:
        return theirs
    a, b = 2 * torch.softmax(net.wg_0.weight @ token, 0)
    return torch.cat([a * ours, b * theirs])


@pytest.mark.parametrize(("shared", "routed"), KINDS)
def test_gates_and_gradients_equal_the_equations(shared: int, routed: int) -> None:
    net = router(shared, routed)
    x = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    expected = torch.stack([gates_of(token, net) for token in x.flatten(0, 1)]).unflatten(0, (2, 7))
    actual = net(x).gates
    wanted = [x, *net.parameters()] if len(list(net.parameters())) else [x]
    weight = torch.randn_like(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    if not expected.requires_grad:
        return
    for got, want in zip(
        torch.autograd.grad((actual * weight).sum(), wanted),
        torch.autograd.grad((expected * weight).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(("shared", "routed"), KINDS)
def test_a_router_that_knows_nothing_opens_each_head_by_one_on_average(shared: int, routed: int) -> None:
    net = router(shared, routed)
    for parameter in net.parameters():
        nn.init.zeros_(parameter)
    gates = net(torch.randn(1, 3, 5, dtype=torch.float64)).gates
    torch.testing.assert_close(gates.sum(2), torch.full((1, 3), float(shared + routed), dtype=torch.float64))
    assert ((gates > 0).sum(2) == shared + routed).all()


def test_balance_is_the_number_of_chosen_heads_where_all_are_chosen_alike_and_more_elsewhere() -> None:
    net = HeadRouter(4, 6, 2, 2, dtype=torch.float64)
    assert net.wg is not None
    nn.init.eye_(net.wg.weight)
    x = 3 * torch.eye(4, dtype=torch.float64)[[0, 1, 2, 3]] + 2 * torch.eye(4, dtype=torch.float64)[[1, 2, 3, 0]]
    even, uneven = net(x[None]).balance, net(x[:1].expand(1, 5, 4)).balance
    assert even is not None
    assert uneven is not None
    assert even.item() == pytest.approx(2)
    assert uneven.item() > 3


def test_a_rare_head_is_pushed_by_the_balance_and_the_choice_is_not_differentiable() -> None:
    net = router(1, 2)
    x = torch.randn(1, 50, 5, dtype=torch.float64)
    p = (x @ net.wg.weight.T).softmax(2)  # type: ignore[union-attr]
    chosen = torch.zeros_like(p).scatter(2, p.topk(2, 2).indices, 1.0).mean((0, 1))
    (actual,) = torch.autograd.grad(net(x).balance, [net.wg.weight])  # type: ignore[union-attr]
    (expected,) = torch.autograd.grad(5 * (p.mean((0, 1)) * chosen).sum(), [net.wg.weight])  # type: ignore[union-attr]
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.again = False
        self.router = HeadRouter(5, 6, 2, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        def gated(x: Tensor) -> Tensor:
            return x * self.router(x).gates[:, :, :5]

        return checkpoint(gated, x, use_reentrant=False) if self.again else gated(x)  # type: ignore[return-value]


def test_each_router_is_counted_once_and_its_gradient_survives_checkpointing() -> None:
    net = nn.Sequential(Block(), Block(), HeadRouter(5, 5, 5, 0, dtype=torch.float64))
    x = torch.randn(2, 9, 5, dtype=torch.float64)
    results = []
    for again in (False, True):
        net[0].again = net[1].again = again  # type: ignore[assignment]
        other = Block()
        with balance_losses(net) as found:
            out = net(x).gates
            other(x)
        net(x)
        assert len(found) == 2
        loss = out.square().mean() + torch.stack(found).mean()
        results.append([loss, *torch.autograd.grad(loss, list(net.parameters()))])
        assert len(found) == 2
    for kept, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, kept, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ((6, 7, 0), "num_shared must lie in 0…6, the heads, got 7"),
        ((6, -1, 2), "num_shared must lie in 0…6, the heads, got -1"),
        ((6, 2, 5), "num_routed must lie in 1…4, the heads that are not shared, got 5"),
        ((6, 2, 0), "num_routed must lie in 1…4, the heads that are not shared, got 0"),
        ((6, 6, 1), "num_routed must be 0, since all heads are shared, got 1"),
    ],
)
def test_wrong_numbers_of_heads_are_named(numbers: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"HeadRouter: {message}"):
        HeadRouter(8, *numbers)
