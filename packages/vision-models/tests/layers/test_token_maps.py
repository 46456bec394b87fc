"""Token maps: windows, padding, convolutions and the MLP against loops and torch's own functions."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vision_models.layers.token_maps import DepthwiseConv, Mlp, from_windows, init_linear, pad_map, to_windows


def test_windows_hold_their_tokens_row_by_row_and_zeros_outside() -> None:
    x = torch.randn(2, 5, 7, 3)
    windows = to_windows(x, 2, 3)
    assert windows.shape == (2 * 3 * 3, 6, 3)
    for image in range(2):
        for window in range(9):
            for cell in range(6):
                row, column = window // 3 * 2 + cell // 3, window % 3 * 3 + cell % 3
                expected = x[image, row, column] if row < 5 and column < 7 else torch.zeros(3)
                assert torch.equal(windows[image * 9 + window, cell], expected)
    assert torch.equal(from_windows(windows, 2, 3, x), x)


def test_maps_are_padded_below_and_to_the_right() -> None:
    x = torch.randn(1, 3, 5, 8)
    padded = pad_map(x, 4)
    assert padded.shape == (1, 3, 8, 8)
    assert torch.equal(padded[:, :, :5], x)
    assert not padded[:, :, 5:].any()


def test_depthwise_convolution_and_its_gradients_equal_torchs_in_both_modes() -> None:
    conv: Any = DepthwiseConv(6, 3).double()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    expected = F.conv2d(x.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=1, groups=6).permute(0, 2, 3, 1)
    wanted = [x, conv.weight, conv.bias]
    for training in (True, False):
        out = conv.train(training)(x)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        grads = [torch.autograd.grad(y.square().sum(), wanted, retain_graph=True) for y in (out, expected)]
        for actual, other in zip(*grads, strict=True):
            torch.testing.assert_close(actual, other, rtol=1e-11, atol=1e-11)


def test_mlp_is_two_linear_maps_and_the_exact_gelu_between() -> None:
    mlp = Mlp(6, 10).double()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    hidden: Tensor = x @ mlp.fc1.weight.mT + mlp.fc1.bias
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(mlp(x), hidden @ mlp.fc2.weight.mT + mlp.fc2.bias, rtol=1e-12, atol=1e-12)


def test_linear_layers_start_narrow_without_bias_and_others_stay() -> None:
    linear, norm = nn.Linear(200, 100), nn.LayerNorm(5)
    nn.init.ones_(norm.bias)
    init_linear(linear)
    init_linear(norm)
    assert abs(float(linear.weight.detach().std()) - 0.02) < 1e-3
    assert not linear.bias.any()
    assert norm.bias.all()
