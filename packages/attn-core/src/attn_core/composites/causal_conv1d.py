"""Causal depth-wise convolution along a sequence, with the state that a later piece starts from (Mamba's short filter).

Plain torch: ``conv1d`` keeps its input and nothing else for backward.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from attn_core.checks import check_choice, check_rank, check_same, check_size

OPERATOR = "causal_conv1d"
Activation = Literal["silu"]


def causal_conv1d(
    x: Float[Tensor, "B C T"],
    weight: Float[Tensor, "C W"],
    bias: Float[Tensor, " C"] | None = None,
    *,
    activation: Activation | None = None,
    initial_state: Float[Tensor, "B C W_1"] | None = None,
    sequence: Int[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "B C T"], Float[Tensor, "B C W_1"]]:
    """y_t = Σ_w weight_w · x_{t − W + 1 + w} + bias for each channel, then SiLU if asked; and the last W − 1 inputs.

    Args:
        initial_state: the W − 1 inputs before the first, zeros by default.
        sequence: number of the sequence that each token belongs to: nothing is read across a change. Negative numbers
            are padding, whose outputs are 0.

    Returns:
        y in the dtype of x, computed in that of ``weight``; the state from which the next piece goes on.

    Raises:
        ValueError: shapes do not fit; ``sequence`` and ``initial_state`` together.

    Source: Gu and Dao 2023 (arXiv 2312.00752); https://github.com/Dao-AILab/causal-conv1d.
    """
    _check(OPERATOR, x, weight, bias, activation)
    channels, width = weight.shape
    if sequence is not None:
        check_rank(OPERATOR, "sequence", sequence, "B T")
        check_size(OPERATOR, "sequence", sequence, 1, x.shape[2], "the steps of x")
    if sequence is not None and initial_state is not None:
        raise ValueError(f"{OPERATOR}: initial_state must be None where sequence is given, got both")
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], channels, width - 1)
    check_rank(OPERATOR, "initial_state", initial_state, "B C W−1")
    check_size(OPERATOR, "initial_state", initial_state, 2, width - 1, "the width of weight less 1")
    whole = torch.cat([initial_state.to(x.dtype), x], -1)
    state = whole[..., whole.shape[-1] - (width - 1) :]
    dtype = weight.dtype
    if sequence is None:
        y = F.conv1d(whole.to(dtype), weight.unsqueeze(1), None if bias is None else bias.to(dtype), groups=channels)
    else:
        y = _apart(whole.to(dtype), weight, sequence)
        if bias is not None:
            y = y + bias.to(dtype).unsqueeze(-1)
    if activation is not None:
        y = F.silu(y)
    if sequence is not None:
        y = y * (sequence >= 0).unsqueeze(1)
    return y.to(x.dtype), state


def _apart(whole: Tensor, weight: Tensor, sequence: Tensor) -> Tensor:
    """The sum over taps, each only where it reads its own sequence."""
    steps, width = sequence.shape[1], weight.shape[1]
    padded = F.pad(sequence, (width - 1, 0), value=-1)
    y = whole.new_zeros(whole.shape[0], whole.shape[1], steps)
    for tap in range(width):
        same = (padded[:, tap : tap + steps] == sequence).unsqueeze(1)
        y = y + weight[:, tap, None] * (whole[..., tap : tap + steps] * same)
    return y


def _check(name: str, x: Tensor, weight: Tensor, bias: Tensor | None, activation: object) -> None:
    check_rank(name, "x", x, "B C T")
    check_rank(name, "weight", weight, "C W")
    check_same(name, x, {"weight": weight, "bias": bias}, dtype=False, first_name="x")
    check_size(name, "weight", weight, 0, x.shape[1], "the channels of x")
    if bias is not None:
        check_rank(name, "bias", bias, "C")
        check_size(name, "bias", bias, 0, x.shape[1], "the channels of x")
    check_choice(name, "activation", activation, (None, "silu"))


def causal_conv1d_update(
    x: Float[Tensor, "B C T"],
    state: Float[Tensor, "B C S"],
    weight: Float[Tensor, "C W"],
    bias: Float[Tensor, " C"] | None = None,
    *,
    activation: Activation | None = None,
    positions: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "B C T"]:
    """The next tokens of sequences whose last S ≥ W − 1 inputs are in ``state``, which is changed in place.

    Args:
        positions: tokens seen so far; ``state`` is a ring then, and token t stands at t modulo S. By default the state
            is shifted.

    Raises:
        ValueError: shapes do not fit.
    """
    name = "causal_conv1d_update"
    _check(name, x, weight, bias, activation)
    check_rank(name, "state", state, "B C S")
    channels, width = weight.shape
    if positions is not None:
        check_rank(name, "positions", positions, "B")
    length, steps = state.shape[2], x.shape[2]
    if length < width - 1:
        raise ValueError(f"{name}: state must hold at least W − 1 = {width - 1} inputs, got {length}")
    if positions is None:
        whole = torch.cat([state.to(x.dtype), x], -1)
        state.copy_(whole[..., whole.shape[-1] - length :])
        before = whole[..., length - (width - 1) : length]
    else:
        span = torch.arange(-(width - 1), 0, device=x.device) + positions.long().unsqueeze(1)
        index = span.remainder(length).unsqueeze(1).expand(-1, channels, -1)
        before = state.gather(2, index).to(x.dtype)
        place = torch.arange(steps, device=x.device) + positions.long().unsqueeze(1)
        state.scatter_(2, place.remainder(length).unsqueeze(1).expand(-1, channels, -1), x.to(state.dtype))
    return causal_conv1d(x, weight, bias, activation=activation, initial_state=before)[0]
