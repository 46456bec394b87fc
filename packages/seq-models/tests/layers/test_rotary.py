"""Rotary position embedding against a product of complex numbers."""

import pytest
import torch

from seq_models.layers.rotary import rotate


@pytest.mark.parametrize("width", [8, 9])
def test_rotation_is_a_product_of_complex_numbers_and_leaves_an_odd_channel(width: int) -> None:
    x, position = torch.randn(2, 5, width).double(), torch.tensor([0, 3, 4, 9, 100])
    angle = position.double()[:, None] * 10000.0 ** (-torch.arange(0, width - 1, 2).double() / width)
    pairs = torch.view_as_complex(x[..., :8].unflatten(-1, (-1, 2)).contiguous())
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)
    assert (rotate(x, position, 10000.0) - torch.cat([expected, x[..., 8:]], -1)).abs().max() < 1e-10
