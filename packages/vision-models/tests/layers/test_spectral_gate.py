"""The spectral gate against the convolution that it is, tap by tap; and what it makes of maps of another size."""

from typing import Any

import pytest
import torch
from torch import Tensor

from vision_models.layers.spectral_gate import SpectralGate, kernel_of, resized_gate, spectrum


def taps_of(weight: Tensor, width: int) -> Tensor:
    """The kernel (Y, X, C), shift 0 first, of a weight (Y, X/2 + 1, C, 2), as a sum of waves."""
    height = weight.shape[0]
    rows, columns, lines = torch.arange(height), torch.arange(width), torch.arange(weight.shape[1])
    # Waves stand for themselves and their mirror image, but for the constant one and the shortest one.
    twice = torch.where((lines == 0) | (2 * lines == width), 1.0, 2.0).double()
    down = (rows[:, None] * rows).double() / height  # (i, u)
    right = (columns[:, None] * lines).double() / width  # (j, l)
    angle = 2 * torch.pi * (down[:, None, :, None] + right[None, :, None, :])
    waves = torch.stack([angle.cos(), -angle.sin()], -1) * twice[None, None, None, :, None]
    return torch.einsum("ijulp,ulcp->ijc", waves, weight) / (height * width)


def convolved(x: Tensor, taps: Tensor) -> Tensor:
    """(B, Y, X, C) with every pixel's neighbors at all shifts, around the edges."""
    shifts = [(i, j) for i in range(taps.shape[0]) for j in range(taps.shape[1])]
    return sum((x.roll(shift, (1, 2)) * taps[shift] for shift in shifts), torch.zeros_like(x))


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (6, 5), (1, 1), (7, 2)], ids=str)
def test_output_and_gradients_equal_the_convolution_around_the_edges(grid: tuple[int, int]) -> None:
    gate: Any = SpectralGate(3, grid, dtype=torch.float64)
    x = torch.randn(2, *grid, 3, dtype=torch.float64, requires_grad=True)
    outs = gate(x), convolved(x, taps_of(gate.complex_weight, grid[1]))
    torch.testing.assert_close(*outs, rtol=1e-11, atol=1e-12)
    aim = torch.randn_like(x)
    grads = [torch.autograd.grad((out * aim).sum(), [x, gate.complex_weight]) for out in outs]
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("built", [(4, 6), (5, 7)], ids=str)
@pytest.mark.parametrize("grid", [(9, 8), (8, 11), (3, 5), (4, 7), (2, 12)], ids=str)
def test_a_map_of_another_size_meets_the_same_taps(built: tuple[int, int], grid: tuple[int, int]) -> None:
    gate: Any = SpectralGate(2, built, dtype=torch.float64)
    own, other = taps_of(gate.complex_weight, built[1]), torch.zeros(*grid, 2, dtype=torch.float64)
    for i in range(-(built[0] // 2), built[0] - built[0] // 2):
        for j in range(-(built[1] // 2), built[1] - built[1] // 2):
            if all(-(side // 2) <= shift < side - side // 2 for shift, side in zip((i, j), grid, strict=True)):
                other[i % grid[0], j % grid[1]] = own[i, j]
    x = torch.randn(1, *grid, 2, dtype=torch.float64)
    torch.testing.assert_close(gate(x), convolved(x, other), rtol=1e-11, atol=1e-12)


def test_a_gate_enlarged_and_shrunk_back_is_the_same() -> None:
    gate: Any = SpectralGate(3, (6, 7), dtype=torch.float64)
    own = spectrum(gate.complex_weight)
    own = torch.fft.rfft2(torch.fft.irfft2(own, s=(6, 7), dim=(0, 1)), dim=(0, 1))  # what it keeps of any weight
    larger = resized_gate(own, (6, 7), (11, 10))
    assert larger.shape == (11, 6, 3)
    torch.testing.assert_close(resized_gate(larger, (11, 10), (6, 7)), own)


def test_the_kernel_has_shift_zero_in_its_middle() -> None:
    identity = torch.ones(5, 3, 2, dtype=torch.complex128)
    for built in ((5, 4), (5, 5)):
        taps = kernel_of(identity, built)
        assert taps[2, 2].tolist() == pytest.approx([1, 1])
        assert taps.abs().sum().item() == pytest.approx(2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_comes_back_and_is_transformed_in_float32(dtype: torch.dtype) -> None:
    gate: Any = SpectralGate(3, (6, 6)).to(dtype)
    x = torch.randn(2, 6, 6, 3, dtype=dtype)
    out = gate(x)
    assert out.dtype == dtype
    exact: Any = SpectralGate(3, (6, 6))
    exact.load_state_dict({name: value.float() for name, value in gate.state_dict().items()})
    assert torch.equal(out, exact(x.float()).to(dtype))
    assert exact(x).dtype == dtype


def test_gates_start_as_noise_of_one_fiftieth() -> None:
    gate: Any = SpectralGate(64, (14, 14))
    weight = gate.complex_weight.detach()
    assert weight.shape == (14, 8, 64, 2)
    assert weight.std().item() == pytest.approx(0.02, rel=0.03)
