"""MultiScaleDeformableAttention, groundingdino._C, and the deformable attention of mmcv._ext and dfa3D._ext."""

from typing import Any

import torch
from torch import Tensor

from attn_core import deformable_attention
from attn_core.composites.depth_sampling import depth_scores, scored_deformable_attention
from attn_core.dispatch import select
from attn_core.ops.deformable_attention import OPERATOR, _implementation, triton_obstacle
from attn_core.ops.deformable_attention.reference import Arguments

from .recompute import fill, gradients, operator_gradients


def _exact(value: Tensor, locations: Tensor) -> Tensor:
    """Locations in float32 at least: in 16 bits they cannot place a sample within a cell."""
    return locations.to(torch.float64 if value.dtype == torch.float64 else torch.float32)


def _sizes(shapes: Any) -> list[tuple[int, ...]]:
    rows = shapes.tolist() if isinstance(shapes, Tensor) else shapes
    return [tuple(row) for row in rows]


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: Any,
) -> Tensor:
    """(N, Lq, M·D); the maps follow each other in ``value``, so that their starts say nothing new."""
    maps = [(size[0], size[1]) for size in _sizes(value_spatial_shapes)]
    weights = attention_weights.to(value.dtype)
    return deformable_attention(value, maps, _exact(value, sampling_locations), weights)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    im2col_step: Any,
) -> list[Tensor]:
    """[grad_value, grad_sampling_locations, grad_attention_weights], each in the dtype of its tensor."""
    flat = [size for sizes in _sizes(value_spatial_shapes) for size in sizes]
    backend = select(OPERATOR, None, value, lambda: triton_obstacle(value=value))
    backend = "torch" if backend == "reference" else backend
    _implementation(backend)  # registers it
    a = Arguments(value, _exact(value, sampling_locations), attention_weights.to(value.dtype), None, flat)
    with torch.no_grad():
        found = operator_gradients(OPERATOR, backend, grad_output.contiguous(), (), a, (True, True, True, False))
    tensors = (value, sampling_locations, attention_weights)
    return [grad.to(tensor.dtype) for grad, tensor in zip(found, tensors, strict=True)]


def mmcv_ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: Any = 64,
) -> None:
    """Fills the three gradients that it is given."""
    found = ms_deform_attn_backward(
        value,
        value_spatial_shapes,
        value_level_start_index,
        sampling_locations,
        attention_weights,
        grad_output,
        im2col_step,
    )
    fill((grad_value, grad_sampling_loc, grad_attn_weight), found)


def ms_depth_score_sample_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    im2col_step: Any = 64,
) -> Tensor:
    """Depth scores (B, N, H, L, P, 4) of the cells around each location; shapes are (h, w, bins)."""
    return _depth_scores(value, sampling_locations, _depth_maps(value, value_spatial_shapes))


def _depth_maps(value: Tensor, shapes: Any) -> list[tuple[int, int]]:
    sizes = _sizes(shapes)
    if any(len(size) > 2 and size[2] != value.shape[-1] for size in sizes):
        raise ValueError(f"ms_depth_score_sample: value_spatial_shapes must end with the {value.shape[-1]} bins")
    return [(size[0], size[1]) for size in sizes]


def _depth_scores(value: Tensor, locations: Tensor, maps: list[tuple[int, int]]) -> Tensor:
    return depth_scores(value, maps, _exact(value, locations)).to(value.dtype)


def ms_depth_score_sample_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    im2col_step: Any = 64,
) -> None:
    """Fills the two gradients that it is given."""
    maps = _depth_maps(value, value_spatial_shapes)
    found = gradients(lambda v, x: _depth_scores(v, x, maps), (value, sampling_locations), (grad_output,))
    fill((grad_value, grad_sampling_loc), found)


def wms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    depth_score: Tensor,
    im2col_step: Any = 64,
) -> Tensor:
    """Deformable attention whose corners are weighted by their depth scores: (B, N, H·D)."""
    maps = [(size[0], size[1]) for size in _sizes(value_spatial_shapes)]
    locations = _exact(value, sampling_locations[..., :2])
    return scored_deformable_attention(value, maps, locations, attention_weights, depth_score)


def wms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    depth_score: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    grad_depth_score: Tensor,
    im2col_step: Any = 64,
) -> None:
    """Fills the four gradients that it is given."""

    def forward(v: Tensor, x: Tensor, w: Tensor, s: Tensor) -> Tensor:
        return wms_deform_attn_forward(v, value_spatial_shapes, value_level_start_index, x, w, s, im2col_step)

    tensors = (value, sampling_locations, attention_weights, depth_score)
    found = gradients(forward, tensors, (grad_output,))
    fill((grad_value, grad_sampling_loc, grad_attn_weight, grad_depth_score), found)
