"""What torch's counter says of the operators."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from attn_core import (
    attention,
    block_attention,
    linear,
    linear_attention,
    neighborhood_attention,
    selective_scan,
    window_index,
)
from attn_core.flops import FORMULAS, count_flops
from attn_core.kernels.registration import OPERATORS


def test_every_operator_has_a_formula() -> None:
    assert {f"{name}_torch" for name in FORMULAS} == {name for name in OPERATORS if name.endswith("_torch")}


def _qkv(tokens: int, device: str) -> list[Tensor]:
    return [torch.randn(2, 3, tokens, 8, device=device) for _ in range(3)]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_and_linear_cost_what_torchs_own_cost(device: str) -> None:
    q, k, v = _qkv(20, device)
    expected = count_flops(lambda: F.scaled_dot_product_attention(q, k, v))
    assert count_flops(lambda: attention(q, k, v)) == expected == 2 * 2 * 2 * 3 * 20 * 20 * 8
    x, weight = torch.randn(2, 5, 8, device=device), torch.randn(16, 8, device=device)
    assert count_flops(lambda: linear(x, weight)) == count_flops(lambda: F.linear(x, weight)) == 2 * 2 * 5 * 8 * 16


def test_windows_cost_attention_inside_each_window() -> None:
    q, k, v = _qkv(64, "cpu")
    index = window_index(8, 8, (4, 4))
    whole = count_flops(lambda: attention(q, k, v))
    assert count_flops(lambda: block_attention(q, k, v, index, index)) == whole // 4


def test_neighbors_and_states_are_counted_instead_of_pairs() -> None:
    q, k, v = _qkv(50, "cpu")
    assert count_flops(lambda: neighborhood_attention(q, k, v, 7)) == 4 * 2 * 3 * 50 * 7 * 8
    assert count_flops(lambda: linear_attention(q, k, v)) == 4 * 2 * 3 * 50 * 8 * 8
    u, maps = torch.randn(2, 6, 5), torch.randn(2, 1, 3, 5)
    assert count_flops(lambda: selective_scan(u, u, -torch.ones(6, 3), maps, maps)) == 2 * 3 * 2 * 6 * 5 * 3
