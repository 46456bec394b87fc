"""InLine attention against its N×N form."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_models.layers.inline import InLineMixing

HEADS, DIM = 2, 12


def _mixing(**options: Any) -> InLineMixing:
    mixing = InLineMixing(DIM, HEADS, **options).double()
    for parameter in mixing.parameters():
        nn.init.normal_(parameter, std=0.5)
    return mixing


def _kernels(mixing: Any, source: Tensor) -> Tensor:
    """(B, C, 3, 3): two layers, each head for itself."""
    hidden = source.mean(1)
    for layer in (mixing.residual[0], mixing.residual[2]):
        parts = zip(hidden.chunk(HEADS, 1), layer.weight[:, :, 0].chunk(HEADS), layer.bias.chunk(HEADS), strict=True)
        hidden = torch.cat([F.linear(x, weight, bias) for x, weight, bias in parts], 1)
        hidden = F.gelu(hidden) if layer is mixing.residual[0] else hidden
    return hidden.view(-1, DIM, 3, 3)


def plain(mixing: Any, q: Tensor, k: Tensor, v: Tensor, source: Tensor, grid: tuple[int, int]) -> Tensor:
    count = q.shape[1]
    before = count - grid[0] * grid[1]
    outs = []
    for h in range(HEADS):
        part = slice(h * DIM // HEADS, (h + 1) * DIM // HEADS)
        scores = (DIM / HEADS) ** -0.5 * q[..., part] @ k[..., part].mT / count
        outs.append((scores - scores.mean(-1, keepdim=True) + 1 / count) @ v[..., part])
    maps = v[:, before:].mT.unflatten(2, grid)
    kernels = _kernels(mixing, source)
    local = torch.cat(
        [F.conv2d(m[None], w[:, None], padding=1, groups=DIM) for m, w in zip(maps, kernels, strict=True)]
    )
    if mixing.get_v is not None:
        local = local + F.conv2d(maps, mixing.get_v.weight, mixing.get_v.bias, padding=1, groups=DIM)
    return torch.cat(outs, 2) + F.pad(local.flatten(2).mT, (0, 0, before, 0))


# CSwin, which alone has the convolution on v, has no class token before the grid.
@pytest.mark.parametrize(
    ("grid", "before", "lepe"),
    [((5, 7), 0, False), ((5, 7), 0, True), ((1, 1), 0, False), ((1, 1), 0, True), ((4, 3), 1, False)],
)
def test_output_and_gradients_equal_the_plain_form(grid: tuple[int, int], before: int, lepe: bool) -> None:
    mixing = _mixing(lepe=lepe)
    tokens = before + grid[0] * grid[1]
    q, k, v, source = inputs = [torch.randn(2, tokens, DIM, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    weight = torch.randn(2, tokens, DIM, dtype=torch.float64)
    results = []
    for out in (mixing(q, k, v, source, grid), plain(mixing, q, k, v, source, grid)):
        results.append([out.detach(), *torch.autograd.grad((out * weight).sum(), [*inputs, *mixing.parameters()])])
    for actual, expected in zip(*results, strict=True):
        assert (actual - expected).abs().max() <= 1e-10 * max(1.0, float(expected.abs().max()))


def test_weights_of_a_query_sum_to_one() -> None:
    mixing = _mixing()
    nn.init.zeros_(mixing.get_parameter("residual.2.weight"))
    nn.init.zeros_(mixing.get_parameter("residual.2.bias"))
    q, k = torch.randn(2, 1, 20, DIM, dtype=torch.float64)
    v = torch.randn(1, 1, DIM, dtype=torch.float64).expand(1, 20, DIM)
    torch.testing.assert_close(mixing(q, k, v, q, (4, 5)), v)


def test_two_queries_of_one_direction_read_differently() -> None:
    """The paper's point: plain linear attention, which normalizes by a sum, cannot tell q from 2·q."""
    mixing = _mixing()
    k, v = torch.randn(2, 1, 20, DIM, dtype=torch.float64)
    q = torch.randn(1, 20, DIM, dtype=torch.float64)
    nn.init.zeros_(mixing.get_parameter("residual.2.weight"))
    nn.init.zeros_(mixing.get_parameter("residual.2.bias"))
    assert (mixing(q, k, v, q, (4, 5)) - mixing(2 * q, k, v, q, (4, 5))).abs().min() > 1e-6


def test_nothing_of_the_size_of_all_pairs_is_kept() -> None:
    mixing = InLineMixing(DIM, HEADS)
    q, k, v = (torch.randn(1, 576, DIM, requires_grad=True) for _ in range(3))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (sizes.append(t.numel()), t)[1], lambda t: t):
        mixing(q, k, v, q, (24, 24))
    assert 0 < max(sizes) < 576 * 576 / 10
