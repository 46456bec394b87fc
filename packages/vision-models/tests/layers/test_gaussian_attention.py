"""GAAM on maps: the channels of each place weigh themselves, by the rule written out."""

from typing import Any

import torch
from torch import nn

from vision_models.layers.gaussian_attention import GAAM


def test_channels_of_a_place_are_weighed_and_the_map_is_added() -> None:
    gate: Any = GAAM(6, num_heads=2, num_gaussians=1).double()
    layer = gate.layers[0]
    nn.init.constant_(layer.c, 0.8)
    nn.init.constant_(layer.mean_offsets, 0.1)
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    chunk = x.unflatten(1, (2, 3))
    deviation = (chunk.var(2, keepdim=True) + 1e-8).sqrt()
    density = (-(((chunk - chunk.mean(2, keepdim=True) - 0.1) / deviation) ** 2) / (2 * 0.8**2)).exp()
    weights = (density / density.sum(2, keepdim=True)).flatten(1, 2)
    torch.testing.assert_close(gate(x), x + x * weights)


def test_each_layer_has_an_axis_of_its_own_and_width_costs_nothing() -> None:
    gate: Any = GAAM(64, (1, 2), 4, 3)
    assert [layer.axis for layer in gate.layers] == [1, 2]
    assert sum(p.numel() for p in gate.parameters()) == 2 * 2 * 4 * 3
