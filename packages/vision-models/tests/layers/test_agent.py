"""Agent attention against a formulation with both softmaxes in full."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_models.layers.agent import AgentMixing, mean_cells

HEADS, DIM = 2, 12


def _mixing(grid: tuple[int, int], agents: int, **options: Any) -> AgentMixing:
    mixing = AgentMixing(DIM, HEADS, grid, agents, **options).double()
    for parameter in mixing.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixing


def _bias(mixing: Any, small: str, row: str, column: str, grid: tuple[int, int]) -> Tensor:
    """(H, A, Y, X): tables summed on the map they are made for, stretched there, then along the grid of agents."""
    tables = dict(mixing.named_parameters())
    bias = F.interpolate(tables[small], size=grid, mode="bilinear")
    rows, columns = tables[row], tables[column]  # (H, A, Y) and (H, A, X)
    if row == "ha_bias":  # the agent stands last
        rows, columns = rows.mT, columns.mT
    bias = bias + F.interpolate(rows[..., None] + columns[:, :, None], size=grid, mode="bilinear")
    cells = bias.flatten(2).mT.unflatten(2, (mixing.side, mixing.side))
    return F.interpolate(cells, size=mixing.shape, mode="bilinear").flatten(2).mT.unflatten(2, grid)


def plain(mixing: Any, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]) -> Tensor:
    before = q.shape[1] - grid[0] * grid[1]
    pooled = F.adaptive_avg_pool2d(q[:, before:].mT.unflatten(2, grid), mixing.shape).flatten(2).mT
    b1 = _bias(mixing, "an_bias", "ah_bias", "aw_bias", grid).flatten(2)
    b2 = _bias(mixing, "na_bias", "ha_bias", "wa_bias", grid).flatten(2).mT
    if before:
        b1, b2 = torch.cat([mixing.ac_bias[0], b1], 2), torch.cat([mixing.ca_bias[0], b2], 1)
    outs = []
    for h in range(HEADS):
        part = slice(h * DIM // HEADS, (h + 1) * DIM // HEADS)
        scale = (DIM / HEADS) ** -0.5
        collect = (scale * pooled[..., part] @ k[..., part].mT + b1[h]).softmax(-1)
        read = (scale * q[..., part] @ pooled[..., part].mT + b2[h]).softmax(-1)
        outs.append(read @ collect @ v[..., part])
    out = torch.cat(outs, 2)
    local = F.conv2d(v[:, before:].mT.unflatten(2, grid), mixing.dwc.weight, mixing.dwc.bias, padding=1, groups=DIM)
    return out + F.pad(local.flatten(2).mT, (0, 0, before, 0))


@pytest.mark.parametrize(
    ("grid", "options"),
    [
        ((6, 6), {}),
        ((5, 9), {}),
        ((1, 1), {}),
        ((5, 9), {"shape": (2, 3)}),
        ((6, 6), {"class_token": True}),
        ((4, 7), {"class_token": True}),
    ],
    ids=str,
)
@pytest.mark.parametrize("agents", [4, 9])
def test_output_and_gradients_equal_the_plain_form(grid: tuple[int, int], options: dict[str, Any], agents: int) -> None:
    mixing = _mixing((6, 6), agents, **options)
    tokens = grid[0] * grid[1] + bool(options.get("class_token"))
    q, k, v = inputs = [torch.randn(2, tokens, DIM, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    weight = torch.randn(2, tokens, DIM, dtype=torch.float64)
    results = []
    for out in (mixing(q, k, v, q, grid), plain(mixing, q, k, v, grid)):
        results.append([out.detach(), *torch.autograd.grad((out * weight).sum(), [*inputs, *mixing.parameters()])])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max()))


def test_nothing_of_the_size_of_all_pairs_is_kept() -> None:
    mixing = AgentMixing(DIM, HEADS, (24, 24), 4)
    q, k, v = (torch.randn(1, 576, DIM, requires_grad=True) for _ in range(3))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        mixing(q, k, v, q, (24, 24))
    assert 0 < max(sizes) < 576 * 576 / 10


def test_class_token_is_not_convolved_and_not_pooled() -> None:
    mixing = _mixing((4, 4), 4, class_token=True)
    q, k, v = torch.randn(3, 1, 17, DIM, dtype=torch.float64)
    out = mixing(q, k, v, q, (4, 4))
    nn.init.zeros_(mixing.get_parameter("dwc.weight"))
    torch.testing.assert_close(mixing(q, k, v, q, (4, 4))[:, 0], out[:, 0], rtol=1e-12, atol=1e-12)
    q = q.clone()
    q[:, 0] += 1  # the agents stay, so only the class token reads otherwise
    torch.testing.assert_close(mixing(q, k, v, q, (4, 4))[:, 1:], mixing(q, k, v, q, (4, 4))[:, 1:])
    assert not torch.allclose(mixing(q, k, v, q, (4, 4))[:, 0], out[:, 0])


def test_keys_of_a_smaller_map_have_tables_and_values_of_their_own_size() -> None:
    """Values are enlarged before they are convolved, as in the official code."""
    mixing = _mixing((6, 8), 4, kv_grid=(3, 4))
    assert mixing.ah_bias.shape == (HEADS, 4, 3)
    assert mixing.ha_bias.shape == (HEADS, 6, 4)
    q = torch.randn(2, 48, DIM, dtype=torch.float64)
    k, v = torch.randn(2, 2, 12, DIM, dtype=torch.float64)
    out = mixing(q, k, v, q, (6, 8), (3, 4))
    large = F.interpolate(v.mT.unflatten(2, (3, 4)), (6, 8), mode="bilinear")
    weight, bias = mixing.get_parameter("dwc.weight"), mixing.get_parameter("dwc.bias")
    local = F.conv2d(large, weight, bias, padding=1, groups=DIM).flatten(2).mT
    nn.init.zeros_(weight)
    nn.init.zeros_(bias)
    torch.testing.assert_close(mixing(q, k, v, q, (6, 8), (3, 4)) + local, out, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"agents": 10}, "agents must be the square of a positive number, got agents=10"),
        ({"agents": 0}, "agents must be the square of a positive number, got agents=0"),
        ({"agents": 4, "shape": (0, 2)}, r"shape must be two positive numbers, got shape=\(0, 2\)"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"AgentMixing: {message}"):
        AgentMixing(DIM, HEADS, (4, 4), **options)


@pytest.mark.parametrize("size", [(1, 1), (4, 7), (9, 9), (13, 5)], ids=str)
@pytest.mark.parametrize("shape", [(3, 3), (2, 5)], ids=str)
def test_means_of_an_exported_graph_are_those_of_adaptive_pooling(
    size: tuple[int, int], shape: tuple[int, int]
) -> None:
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(mean_cells(x, shape), F.adaptive_avg_pool2d(x, shape), rtol=1e-12, atol=1e-12)
