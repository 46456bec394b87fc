"""The shim of natten 0.20 and later beside the real one."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from attn_core.compat import Provided
from attn_core.testing import relative_error

# The real one and flex_attention warn about their own arguments.
pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize(
    ("grid", "rules"),
    [
        ((24,), {"kernel_size": 5, "dilation": 2}),
        ((24,), {"kernel_size": 6, "stride": 2}),
        ((9, 8), {"kernel_size": (3, 4), "stride": (2, 1)}),
        ((9, 8), {"kernel_size": 3, "dilation": 2, "is_causal": (True, False)}),
        ((4, 5, 6), {"kernel_size": 3, "is_causal": (False, True, False)}),
    ],
)
def test_outputs_and_lse_of_grouped_heads_equal_the_real_ones(
    grid: tuple[int, ...], rules: dict[str, Any], shim: Callable[..., Provided]
) -> None:
    q = torch.randn(2, *grid, 4, 16)
    k, v = (torch.randn(2, *grid, 2, 16) for _ in range(2))
    name = f"na{len(grid)}d"
    real = getattr(pytest.importorskip("natten"), name)
    expected = real(q, k, v, **rules, backend="flex-fna", return_lse=True)
    shim("natten@0.20")
    ours = getattr(importlib.import_module("natten"), name)
    assert ours is not real
    for actual, right in zip(ours(q, k, v, **rules, return_lse=True), expected, strict=True):
        assert relative_error(actual, right) <= 2e-5
