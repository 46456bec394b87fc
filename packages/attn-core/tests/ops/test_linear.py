"""linear: the module's keys, the fused road, and every message."""

import importlib
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from attn_core import linear, torch_internals
from attn_core.nn import Linear, through_gelu
from attn_core.ops.linear import torch_backend
from attn_core.testing import relative_error

package = importlib.import_module("attn_core.ops.linear")


def test_module_has_the_keys_and_the_result_of_torchs_linear() -> None:
    ours, theirs = Linear(13, 7), nn.Linear(13, 7)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 5, 13)
    assert relative_error(ours(x), theirs(x)) <= 1e-6


def test_gelu_fused_into_inference_equals_gelu_of_training() -> None:
    layer = Linear(64, 160)
    x = torch.randn(9, 64)
    with torch.no_grad():
        fused = through_gelu(layer, x)
    assert relative_error(fused, through_gelu(layer, x)) <= 1e-6


def test_an_exported_product_serves_numbers_of_rows_on_either_side_of_the_rule() -> None:
    layer, rows = Linear(64, 64), torch_backend.SMALL_PRODUCT // 64**2 + 1
    program = torch.export.export(layer, (torch.randn(8, 64),), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    x = torch.randn(rows, 64)
    assert relative_error(program.module()(x), layer(x)) <= 1e-6


def test_gelu_follows_what_others_put_around_the_layer() -> None:
    layer, x = Linear(6, 4), torch.randn(9, 6)
    around = nn.Sequential(layer, nn.Softplus())
    assert torch.equal(through_gelu(around, x), nn.functional.gelu(nn.functional.softplus(layer(x))))


@pytest.fixture(params=["torch", "onednn", "fused"])
def forced_road(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param != "torch" and not torch_backend._ON_X86:
        pytest.skip("oneDNN's roads are for x86 CPUs")
    monkeypatch.setattr(torch_backend, "choose", lambda *_, **__: request.param)
    package._road.cache_clear()  # pyright: ignore[reportFunctionMemberAccess]
    yield request.param
    package._road.cache_clear()  # pyright: ignore[reportFunctionMemberAccess]


@pytest.mark.usefixtures("forced_road")
@pytest.mark.parametrize("activation", [None, "gelu"])
def test_every_road_gives_value_gradient_and_second_derivative(activation: Literal["gelu"] | None) -> None:
    def results(wide: bool) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, weight, bias = (torch.randn(*size, generator=generator) for size in ((9, 7), (5, 7), (5,)))
        x, weight, bias = leaves = [
            t.double().requires_grad_() if wide else t.requires_grad_() for t in (x, weight, bias)
        ]
        backend = "reference" if wide else None
        y = linear(x, weight, bias, activation, backend=backend)
        first = torch.autograd.grad(y.sin().sum(), leaves, create_graph=True)
        second = torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), leaves)
        with torch.no_grad():
            return [linear(x, weight, bias, activation, backend=backend), y, *first, *second]

    for actual, expected in zip(results(wide=False), results(wide=True), strict=True):
        assert relative_error(actual, expected) <= 4e-5


# What was measured on the two kinds of processor: docs/reference/benchmarks.md.
@pytest.mark.parametrize(
    ("rows", "width", "out", "activation", "with_avx512", "without"),
    [
        (16, 64, 64, None, "torch", "torch"),
        (1568, 384, 1536, "gelu", "fused", "torch"),
        (392, 768, 3072, "gelu", "fused", "torch"),
        (25088, 96, 384, "gelu", "fused", "onednn"),
        (25088, 384, 96, None, "onednn", "torch"),
        (3136, 96, 288, None, "onednn", "onednn"),
    ],
)
def test_the_road_is_a_rule_of_processor_and_shape(
    rows: int, width: int, out: int, activation: str | None, with_avx512: str, without: str
) -> None:
    assert torch_backend.choose(rows, width, out, activation, wide_vectors=True) == with_avx512
    assert torch_backend.choose(rows, width, out, activation, wide_vectors=False) == without


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16], ids=str)
def test_other_dtypes_take_torchs_road(kind: torch.dtype) -> None:
    assert torch_backend.road(torch.zeros(4096, 96, dtype=kind), torch.zeros(384, 96, dtype=kind), None) == "torch"


def test_without_torchs_private_operator_the_result_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = torch.randn(2100, 70), torch.randn(256, 70), torch.randn(256)
    with torch.no_grad():
        expected = linear(x, weight, bias, "gelu")
        monkeypatch.setattr(torch_internals, "linear_pointwise", None)
        package._road.cache_clear()  # pyright: ignore[reportFunctionMemberAccess]
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
