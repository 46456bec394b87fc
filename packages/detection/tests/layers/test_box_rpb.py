"""BoxRPB against its equations with all scores, its own backward pass, and its memory."""

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_core.testing import peak_memory
from detection.bench.attention import materialized
from detection.layers.box_rpb import BoxRPBAttention


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("position_bias", ["linear", "log", "none"])
@pytest.mark.parametrize("soft_mask", [True, False])
def test_box_rpb_equals_the_materialized_equation(position_bias: Any, soft_mask: bool) -> None:
    module = BoxRPBAttention(32, 4, position_bias=position_bias, hidden_dim=16, stride=8).double()
    rows, columns, count = 5, 7, 11
    query, key = torch.randn(2, count, 32).double(), torch.randn(2, rows * columns, 32).double()
    boxes = torch.rand(2, count, 4).double() * 40
    visible = torch.ones(2, rows, columns, dtype=torch.bool)
    visible[1, 3:] = False
    visible = visible.flatten(1)
    out = module(query, boxes, key, key + 1, (rows, columns), visible=visible, soft_mask=soft_mask)

    q, k, v = (
        f(x).view(2, -1, 4, 8).transpose(1, 2) for f, x in ((module.q, query), (module.k, key), (module.v, key + 1))
    )
    scores = q @ k.transpose(-2, -1) / 8**0.5
    if position_bias != "none":
        cx, cy, w, h = boxes.unbind(-1)
        for j in range(rows):
            for i in range(columns):
                dx = torch.stack([cx - w / 2 - (i + 0.5) * 8, cx + w / 2 - (i + 0.5) * 8], -1)
                dy = torch.stack([cy - h / 2 - (j + 0.5) * 8, cy + h / 2 - (j + 0.5) * 8], -1)
                if position_bias == "log":
                    dx, dy = (d.sign() * (d.abs() + 1).log2() / 3 for d in (dx, dy))
                bias = module.cpb_mlp1(dx) + module.cpb_mlp2(dy)
                scores[..., j * columns + i] += bias.transpose(1, 2)
    mask = -100.0 if soft_mask else float("-inf")
    scores = torch.where(visible[:, None, None], scores, scores + mask)
    expected = module.proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)


def test_chunks_of_queries_give_the_same_gradients_with_a_fraction_of_the_memory() -> None:
    """At 600 queries × 60×40 keys the scores alone would take 600·2400·8 floats, and a step holds four such tensors."""
    module = BoxRPBAttention(64, 8, hidden_dim=32)
    query, key = torch.randn(1, 600, 64, requires_grad=True), torch.randn(1, 2400, 64, requires_grad=True)
    boxes = torch.rand(1, 600, 4) * 500

    def step() -> tuple[Tensor, ...]:
        out = module(query, boxes, key, key, (40, 60))
        return torch.autograd.grad(out.square().sum(), [query, key, *module.parameters()])

    scores = 600 * 2400 * 8 * 4
    assert peak_memory(step) < scores
    module, boxes = module.double(), boxes.double()
    query, key = (x.detach().double().requires_grad_() for x in (query, key))
    chunked = step()
    whole = materialized(module, query, boxes, key, key, (40, 60)).square().sum()
    for ours, expected in zip(chunked, torch.autograd.grad(whole, [query, key, *module.parameters()]), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("position_bias", ["linear", "log"])
def test_gradients_reach_boxes_and_weights_through_the_table(position_bias: Any) -> None:
    module = BoxRPBAttention(16, 2, position_bias=position_bias, hidden_dim=8, stride=8).double()
    boxes = (torch.rand(1, 5, 4).double() * 40).requires_grad_()

    def tables(boxes: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        return module.axis_bias(boxes, (3, 4))

    assert torch.autograd.gradcheck(tables, (boxes, *module.cpb_mlp1.parameters(), *module.cpb_mlp2.parameters()))
