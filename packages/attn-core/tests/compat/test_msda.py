"""MSDA and DFA3D: raw functions called with gradients off, beside autograd of the reference and grid_sample."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attn_core import deformable_attention
from attn_core.compat import provide

MAPS = [(5, 7), (3, 2)]
SHAPES = torch.tensor(MAPS)
STARTS = torch.tensor([0, 35])


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    value = torch.randn(2, 41, 3, 4, dtype=dtype)
    locations = torch.rand(2, 6, 3, 2, 2, 2, dtype=dtype) * 1.4 - 0.2  # some outside
    return value, locations, torch.rand(2, 6, 3, 2, 2, dtype=dtype)


def close(actual: Tensor, expected: Tensor, bound: float = 1e-10) -> bool:
    return actual.shape == expected.shape and float((actual.detach() - expected.detach()).abs().max()) <= bound


class TrainedOfficially(torch.autograd.Function):
    """Shaped like the originals: the compiled backward is called inside ``backward``, where grad mode is off."""

    @staticmethod
    def forward(ctx: Any, module: Any, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(value, locations, weights)
        return module.ms_deform_attn_forward(value, SHAPES, STARTS, locations, weights, 64)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        value, locations, weights = ctx.saved_tensors
        assert not torch.is_grad_enabled()
        return None, *ctx.module.ms_deform_attn_backward(value, SHAPES, STARTS, locations, weights, grad, 64)


@pytest.mark.parametrize("name", ["MultiScaleDeformableAttention", "groundingdino._C"])
def test_output_and_gradients_equal_autograd_of_the_reference(name: str, package: Callable[..., Path]) -> None:
    package("groundingdino")
    with provide("msda"):
        module = importlib.import_module(name)
    tensors = [x.requires_grad_() for x in inputs()]
    out = TrainedOfficially.apply(module, *tensors)
    expected = deformable_attention(tensors[0], MAPS, *tensors[1:], backend="reference")
    assert close(out, expected)
    grad = torch.randn_like(out)
    for actual, right in zip(
        torch.autograd.grad(out, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True
    ):
        assert close(actual, right)
    assert all(x.grad is None for x in tensors)


def test_keywords_and_any_step_are_taken_and_half_locations_keep_their_dtype() -> None:
    with provide("msda"):
        module = importlib.import_module("MultiScaleDeformableAttention")
    value, locations, weights = inputs(torch.float32)
    names = ("value", "value_spatial_shapes", "value_level_start_index", "sampling_locations", "attention_weights")
    given = dict(zip(names, (value, SHAPES, STARTS, locations, weights), strict=True))
    out = module.ms_deform_attn_forward(**given, im2col_step=3)
    assert close(out, module.ms_deform_attn_forward(value, SHAPES, STARTS, locations, weights, torch.tensor(64)))
    half = [x.half() for x in (value, locations, weights)]
    grads = module.ms_deform_attn_backward(half[0], SHAPES, STARTS, *half[1:], torch.ones_like(out).half(), 64)
    assert [g.dtype for g in grads] == [torch.float16] * 3


def test_mmcv_backward_fills_what_it_is_given_and_returns_none(package: Callable[..., Path]) -> None:
    package("mmcv")
    with provide("mmcv_ext"):
        module = importlib.import_module("mmcv._ext")
    tensors = [x.requires_grad_() for x in inputs()]
    expected = deformable_attention(tensors[0], MAPS, *tensors[1:], backend="reference")
    grad = torch.randn_like(expected)
    filled = [torch.full_like(x, torch.nan) for x in tensors]
    with torch.no_grad():
        done = module.ms_deform_attn_backward(tensors[0], SHAPES, STARTS, *tensors[1:], grad, *filled, im2col_step=64)
    assert done is None
    for actual, right in zip(filled, torch.autograd.grad(expected, tensors, grad), strict=True):
        assert close(actual, right)


@pytest.fixture
def dfa3d(package: Callable[..., Path]) -> Any:
    package("dfa3D")
    with provide("msda"):
        return importlib.import_module("dfa3D._ext")


def test_two_stages_of_dfa3d_equal_the_fused_operator_forward_and_backward(dfa3d: Any) -> None:
    value, plane, weights = inputs()
    depth = torch.rand(2, 41, 3, 5, dtype=torch.float64)
    locations = torch.cat([plane, torch.rand(2, 6, 3, 2, 2, 1, dtype=torch.float64) * 1.2 - 0.1], -1)
    tensors = [x.requires_grad_() for x in (value, depth, locations, weights)]
    shapes3 = torch.tensor([(h, w, 5) for h, w in MAPS])
    expected = deformable_attention(value, MAPS, locations, weights, depth, backend="reference")
    grad = torch.randn_like(expected)
    right = torch.autograd.grad(expected, tensors, grad)
    with torch.no_grad():
        score = dfa3d.ms_depth_score_sample_forward(depth, shapes3, STARTS, locations, im2col_step=64)
        assert score.shape == (2, 6, 3, 2, 2, 4)
        out = dfa3d.wms_deform_attn_forward(value, SHAPES, STARTS, plane, weights, score, im2col_step=64)
        assert close(out, expected)
        filled = [torch.full_like(x, torch.nan) for x in (value, plane, weights, score)]
        arguments = (value, SHAPES, STARTS, plane, weights, score, grad)
        assert dfa3d.wms_deform_attn_backward(*arguments, *filled, im2col_step=64) is None
        d_depth, d_locations = torch.full_like(depth, torch.nan), torch.full_like(locations, torch.nan)
        arguments = (depth, shapes3, STARTS, locations, filled[3])
        assert dfa3d.ms_depth_score_sample_backward(*arguments, d_depth, d_locations, im2col_step=64) is None
    d_locations[..., :2] += filled[1]
    for actual, expect in zip((filled[0], d_depth, d_locations, filled[2]), right, strict=True):
        assert close(actual, expect)
    assert all(x.grad is None for x in tensors)


def test_depth_scores_stand_in_the_order_of_rows_then_columns(dfa3d: Any) -> None:
    depth = torch.zeros(1, 4, 1, 3)
    depth[0, :, 0, 1] = torch.tensor([1.0, 2.0, 3.0, 4.0])  # a 2×2 map, its middle bin
    middle = torch.full((1, 1, 1, 1, 1, 3), 0.5)
    score = dfa3d.ms_depth_score_sample_forward(depth, torch.tensor([[2, 2, 3]]), torch.tensor([0]), middle)
    assert score.flatten().tolist() == [1.0, 2.0, 3.0, 4.0]
    corner = torch.tensor([0.0, 0.0, 0.5]).view(1, 1, 1, 1, 1, 3)
    score = dfa3d.ms_depth_score_sample_forward(depth, torch.tensor([[2, 2, 3]]), torch.tensor([0]), corner)
    assert score.flatten().tolist() == [0.0, 0.0, 0.0, 1.0]


def test_the_forward_equals_grid_sample() -> None:
    value, locations, weights = inputs()
    with provide("msda"):
        module = importlib.import_module("MultiScaleDeformableAttention")
    total = torch.zeros(2, 6, 3, 4, dtype=torch.float64)
    for level, (h, w) in enumerate(MAPS):
        cells = value[:, STARTS[level] : STARTS[level] + h * w].unflatten(1, (h, w))
        for head in range(3):
            maps = cells[..., head, :].permute(0, 3, 1, 2)
            places = 2 * locations[:, :, head, level] - 1
            samples = F.grid_sample(maps, places, align_corners=False)  # (B, D, N, P)
            total[:, :, head] += (samples * weights[:, None, :, head, level]).sum(-1).transpose(1, 2)
    out = module.ms_deform_attn_forward(value, SHAPES, STARTS, locations, weights, 64)
    assert close(out, total.flatten(2))


def test_mmcv_functions_that_are_not_provided_are_there_and_say_so_when_called(package: Callable[..., Path]) -> None:
    package("mmcv")
    with provide("mmcv_ext"):
        missing = importlib.import_module("mmcv._ext").carafe_forward
    with pytest.raises(NotImplementedError, match=r"mmcv._ext.carafe_forward is not provided by attn_core's shim"):
        missing(1, group_size=2)


def test_mmcv_focal_loss_counts_the_class_behind_the_last_as_background() -> None:
    pytest.importorskip("torchvision")
    from attn_core.compat.shims import mmcv_ext

    x, target = torch.randn(4, 3, dtype=torch.float64), torch.tensor([0, 2, 3, 1])
    out, none = torch.empty_like(x), torch.empty(0)
    mmcv_ext.sigmoid_focal_loss_forward(x, target, none, out, gamma=2.0, alpha=0.25)
    p = x.sigmoid()
    hit = -0.25 * (1 - p) ** 2 * p.log()
    miss = -0.75 * p**2 * (1 - p).log()
    one_hot = F.one_hot(target, 4)[:, :3].bool()
    assert close(out, torch.where(one_hot, hit, miss))
    with pytest.raises(NotImplementedError, match="weights of classes"):
        mmcv_ext.sigmoid_focal_loss_forward(x, target, torch.ones(3), out, gamma=2.0, alpha=0.25)
