"""linear: the module's keys, the fused road, and every message."""

import pytest
import torch
from torch import nn

from attn_core import linear
from attn_core.nn import Linear
from attn_core.ops.linear import torch_backend
from attn_core.testing import relative_error


def test_module_has_the_keys_and_the_result_of_torchs_linear() -> None:
    ours, theirs = Linear(13, 7), nn.Linear(13, 7)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 13)
    assert relative_error(ours(x), theirs(x)) <= 1e-6


def test_gelu_fused_into_inference_equals_gelu_of_training() -> None:
    layer = Linear(64, 160, activation="gelu")
    x = torch.randn(9, 64)
    with torch.no_grad():
        fused = layer(x)
    assert relative_error(fused, layer(x)) <= 1e-6


@pytest.mark.skipif(not torch_backend._ON_X86, reason="oneDNN road is for x86 CPUs")
def test_float32_inference_on_x86_takes_onednn() -> None:
    assert torch_backend._pointwise is not None, "torch renamed its private operator: see torch_backend.py"
    assert torch_backend._takes(torch.zeros(2, 3), torch.zeros(4, 3))
    assert not torch_backend._takes(torch.zeros(2, 3).double(), torch.zeros(4, 3).double())


def test_without_torchs_private_operator_the_result_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(5, 130), torch.randn(140, 130), torch.randn(140)
    expected = linear(x, weight, bias, "gelu")
    monkeypatch.setattr(torch_backend, "_pointwise", None)
    assert relative_error(linear(x, weight, bias, "gelu"), expected) <= 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(3, 6)}, r"linear: x must have size 5 along dimension -1 \(the input width of weight\)"),
        ({"x": torch.zeros(())}, "x must have 2 dimensions"),
        ({"x": torch.zeros(3, 5).long()}, "x must be one of float64"),
        ({"weight": torch.zeros(4, 5, 1)}, r"weight must have 2 dimensions \(C_out C_in\)"),
        ({"weight": torch.zeros(4, 5).double()}, r"weight must have the dtype of x \(torch.float32\)"),
        ({"bias": torch.zeros(3)}, "bias must have size 4 along dimension 0"),
        ({"bias": torch.zeros(1, 4)}, r"bias must have 1 dimensions \(C_out\)"),
        ({"activation": "relu"}, "activation must be one of None, 'gelu', got activation='relu'"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_bad_arguments_are_named(changes: dict[str, object], message: str) -> None:
    arguments = {"x": torch.zeros(3, 5), "weight": torch.zeros(4, 5), "bias": None, **changes}
    with pytest.raises(ValueError, match=message):
        linear(**arguments)  # pyright: ignore[reportArgumentType]


def test_triton_is_refused_with_the_reason() -> None:
    with pytest.raises(RuntimeError, match="linear: backend='triton' cannot run"):
        linear(torch.zeros(2, 3), torch.zeros(4, 3), backend="triton")
