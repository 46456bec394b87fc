"""Deformable convolution v2 beside a loop over its reads, and where a backbone has it."""

import math

import pytest
import torch
from torch import Tensor, nn

from detection.layers.deformable_conv import ModulatedDeformConv
from detection.layers.pyramid import PyramidBackbone


def read(image: Tensor, y: float, x: float) -> Tensor:
    """Bilinear sample of (C, Y, X), zeros outside."""
    total = torch.zeros(image.shape[0], dtype=image.dtype)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < image.shape[1] and 0 <= column < image.shape[2]:
                total += image[:, row, column] * (1 - abs(y - row)) * (1 - abs(x - column))
    return total


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 2)])
@torch.no_grad()
def test_equals_a_loop_over_reads(stride: int, groups: int) -> None:
    torch.manual_seed(0)
    conv = ModulatedDeformConv(nn.Conv2d(4, 6, 3, stride, 1, groups=groups)).double()
    nn.init.normal_(conv.conv_offset.weight, std=0.3)
    x = torch.randn(1, 4, 5, 6).double()
    found, plan = conv(x)[0], conv.conv_offset(x)[0]
    for row in range(found.shape[1]):
        for column in range(found.shape[2]):
            reads = torch.zeros(4, 9).double()
            for i in range(9):
                dy, dx, mask = plan[2 * i, row, column], plan[2 * i + 1, row, column], plan[18 + i, row, column]
                y, x_ = row * stride - 1 + i // 3 + float(dy), column * stride - 1 + i % 3 + float(dx)
                reads[:, i] = read(x[0], y, x_) * mask.sigmoid()
            weight = conv.weight.flatten(2)
            parts = [
                torch.einsum("kci,ci->k", weight[6 // groups * g : 6 // groups * (g + 1)], own)
                for g, own in enumerate(reads.chunk(groups))
            ]
            assert conv.bias is not None
            torch.testing.assert_close(found[:, row, column], torch.cat(parts) + conv.bias, atol=1e-10, rtol=0)


def test_starts_as_half_of_the_convolution_whose_weights_it_has() -> None:
    conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    deformable = ModulatedDeformConv(conv)
    assert deformable.weight is conv.weight
    x = torch.randn(2, 4, 7, 5)
    torch.testing.assert_close(deformable(x), conv(x) / 2)
    deformable(x).square().sum().backward()
    assert deformable.conv_offset.weight.grad is not None
    assert deformable.conv_offset.weight.grad.abs().max() > 0


def test_the_last_three_stages_of_a_resnet_become_deformable() -> None:
    body = PyramidBackbone("test_resnet", 8, (8, 16), deformable=True)
    stages = {name.split(".")[1] for name, module in body.named_modules() if isinstance(module, ModulatedDeformConv)}
    assert stages == {"layer2", "layer3"}  # layer4 is not read
    assert body(torch.rand(1, 3, 32, 32))["0"].shape == (1, 8, 4, 4)


def test_what_cannot_be_deformable_is_named() -> None:
    with pytest.raises(ValueError, match="conv must have a square kernel and zero padding"):
        ModulatedDeformConv(nn.Conv2d(4, 4, (3, 1)))
    with pytest.raises(ValueError, match="deformable=True needs a ResNet or ResNeXt, got backbone='test_vit"):
        PyramidBackbone("test_vit3", 8, (16,), deformable=True)
