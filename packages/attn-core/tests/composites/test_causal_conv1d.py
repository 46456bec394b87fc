"""The short causal filter: pieces equal the whole, sequences stay apart, gradients, errors."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core.composites.causal_conv1d import causal_conv1d, causal_conv1d_update


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((2, 3, 11), (3, 4), (3,))
    x, weight, bias = (torch.randn(size, dtype=torch.float64, requires_grad=True) for size in sizes)
    return x, weight, bias


@pytest.mark.parametrize("cut", [1, 2, 6])
def test_a_sequence_in_two_pieces_equals_the_whole(cut: int) -> None:
    x, weight, bias = inputs()
    whole, last = causal_conv1d(x, weight, bias, activation="silu")
    first, state = causal_conv1d(x[..., :cut], weight, bias, activation="silu")
    second, end = causal_conv1d(x[..., cut:], weight, bias, activation="silu", initial_state=state)
    assert (torch.cat([first, second], -1) - whole).abs().max() <= 1e-12
    assert torch.equal(end, last)
    plain = F.silu(F.conv1d(x, weight[:, None], bias, padding=3, groups=3)[..., :11])
    assert (whole - plain).abs().max() <= 1e-12


def test_gradients_are_those_of_finite_differences() -> None:
    x, weight, bias = inputs()
    state = torch.randn(2, 3, 3, dtype=torch.float64, requires_grad=True)
    sequence = torch.tensor([[0] * 5 + [1] * 6, [0] * 9 + [-1] * 2])

    def together(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> Any:
        apart, _ = causal_conv1d(x, weight, bias, activation="silu", sequence=sequence)
        return apart, *causal_conv1d(x, weight, bias, activation="silu", initial_state=state)

    assert torch.autograd.gradcheck(together, (x, weight, bias, state), fast_mode=True)


def test_padding_gives_zeros_and_is_not_read() -> None:
    x, weight, bias = inputs()
    sequence = torch.tensor([[-1] * 4 + [0] * 7] * 2)
    y, _ = causal_conv1d(x, weight, bias, sequence=sequence)
    alone, _ = causal_conv1d(x[..., 4:], weight, bias)
    assert torch.equal(y[..., :4], torch.zeros_like(y[..., :4]))
    assert (y[..., 4:] - alone).abs().max() <= 1e-12


def test_a_16_bit_input_is_filtered_in_the_dtype_of_the_weight() -> None:
    x, weight, bias = (t.detach() for t in inputs())
    y, _ = causal_conv1d(x.bfloat16(), weight.float(), bias.float())
    exact, _ = causal_conv1d(x.bfloat16().double(), weight, bias)
    assert y.dtype == torch.bfloat16
    assert torch.allclose(y.double(), exact, rtol=2**-8, atol=1e-3)


X, W = torch.zeros(2, 3, 5), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: causal_conv1d(X[0], W), r"causal_conv1d: x must have 3 dimensions \(B C T\), got shape \(3, 5\)"),
        (lambda: causal_conv1d(X, W[:2]), r"causal_conv1d: weight must have size 3 along dimension 0 \(the channels"),
        (lambda: causal_conv1d(X, W, activation="relu"), r"causal_conv1d: activation must be one of None, 'silu'"),  # pyright: ignore[reportArgumentType]
        (lambda: causal_conv1d(X, W, initial_state=X), r"causal_conv1d: initial_state must have size 3 along"),
        (
            lambda: causal_conv1d(X, W, initial_state=X[..., :3], sequence=torch.zeros(2, 5)),
            r"causal_conv1d: initial_state must be None where sequence is given, got both",
        ),
        (lambda: causal_conv1d_update(X, X[..., :2], W), r"causal_conv1d_update: state must hold at least W − 1 = 3"),
    ],
)
def test_messages_name_the_argument_and_the_rule(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
