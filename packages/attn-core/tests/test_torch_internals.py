"""Each private name of torch that the core asks still means what the core takes it for."""

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from attn_core import torch_internals


def test_nobody_watches_a_plain_call() -> None:
    assert not torch_internals.is_watched()


def test_a_dispatch_mode_watches() -> None:
    with TorchDispatchMode():
        assert torch_internals.is_watched()


def test_a_function_mode_watches() -> None:
    with TorchFunctionMode():
        assert torch_internals.is_watched()


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap], ids=["grad", "vmap"])
def test_a_transform_watches(transform: object) -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(torch_internals.is_watched())
        return x.sum()

    if transform is torch.func.grad:
        torch.func.grad(function)(torch.zeros(2))
    else:
        torch.func.vmap(function)(torch.zeros(2, 2))
    assert seen == [True]


def test_forward_mode_watches() -> None:
    with torch.autograd.forward_ad.dual_level():
        assert torch_internals.is_watched()


def test_a_tracer_watches() -> None:
    seen = []

    def function(x: Tensor) -> Tensor:
        seen.append(torch_internals.is_watched())
        return x + 1

    with pytest.warns(FutureWarning, match="jit.trace"):
        torch.jit.trace(function, torch.zeros(2), check_trace=False)
    assert seen == [True]


def test_subclasses_and_meta_tensors_are_not_ordinary() -> None:
    class Marked(Tensor):
        pass

    assert torch_internals.is_ordinary(torch.zeros(1))
    assert torch_internals.is_ordinary(nn.Parameter(torch.zeros(1)))
    assert not torch_internals.is_ordinary(torch.zeros(1).as_subclass(Marked))
    assert not torch_internals.is_ordinary(torch.zeros(1, device="meta"))


def test_autocast_is_seen_and_can_be_left() -> None:
    a = torch.ones(2, 2)
    assert not torch_internals.is_autocast_on()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch_internals.is_autocast_on()
        assert (a @ a).dtype == torch.bfloat16
        with torch_internals.without_autocast():
            assert (a @ a).dtype == torch.float32


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_the_linear_operator_of_onednn_equals_linear_and_gelu(activation: str | None) -> None:
    x, weight, bias = torch.randn(5, 7), torch.randn(3, 7), torch.randn(3)
    expected = nn.functional.linear(x, weight, bias)
    if activation:
        expected = nn.functional.gelu(expected)
    assert torch_internals.linear_pointwise is not None, "torch renamed its private operator"
    kind, algorithm = ("none", "") if activation is None else (activation, "none")
    actual = torch_internals.linear_pointwise(x, weight, bias, kind, [], algorithm)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_torchs_bindings_of_flash_attention_and_gelu_are_the_operators() -> None:
    q, k, v = (torch.randn(1, 2, 8, 4) for _ in range(3))
    bias = torch.randn(1, 1, 8, 8)
    out, lse = torch_internals.flash_cpu(q, k, v, 0.0, False, attn_mask=bias, scale=0.5)
    scores = 0.5 * q @ k.mT + bias
    torch.testing.assert_close(out, scores.softmax(-1) @ v, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    x = torch.randn(5)
    expected = nn.functional.gelu(x)
    assert torch_internals.gelu_(x) is x
    torch.testing.assert_close(x, expected)


def test_transforms_and_fake_tensors_are_seen() -> None:
    seen: list[bool] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch_internals.is_transformed())
        return x * 2

    assert not torch_internals.is_transformed()
    torch.func.vmap(function)(torch.ones(2))
    with FakeTensorMode():
        function(torch.ones(2))
    assert seen == [True, True]
    assert not torch_internals.is_transformed()
