"""mmcv._ext over torchvision: boxes, deformable convolutions, focal loss; the rest is refused by name when called."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .recompute import fill, gradients


def not_provided(name: str) -> Callable[..., Any]:
    """What stands for the other functions: mmcv asks at import whether they are there, and calls few of them."""

    def missing(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"mmcv._ext.{name} is not provided by attn_core's shim; it needs mmcv's own build")

    missing.__name__ = missing.__qualname__ = name
    return missing


def _ops() -> Any:
    import torchvision.ops as ops

    return ops


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int = 0) -> Tensor:
    """Kept boxes by score; offset 1 counts the last pixel."""
    ends = boxes.clone()
    ends[:, 2:] += offset
    return _ops().nms(ends, scores, iou_threshold)


def _pooled(
    x: Tensor, rois: Tensor, height: int, width: int, scale: float, ratio: int, pool_mode: int, aligned: bool
) -> Tensor:
    if pool_mode != 1:
        raise NotImplementedError("mmcv._ext.roi_align: pool_mode 0 (max) is not provided by attn_core's shim")
    return _ops().roi_align(x, rois.to(x.dtype), (height, width), scale, ratio or -1, aligned)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fills ``output``."""
    size = (aligned_height, aligned_width, spatial_scale, sampling_ratio, pool_mode, aligned)
    output.copy_(_pooled(input, rois, *size))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Fills ``grad_input``: the map itself does not matter."""
    size = (aligned_height, aligned_width, spatial_scale, sampling_ratio, pool_mode, aligned)
    found = gradients(lambda x: _pooled(x, rois, *size), (torch.zeros_like(grad_input),), (grad_output,))
    fill((grad_input,), found)


def _convolved(
    x: Tensor, offset: Tensor, mask: Tensor | None, weight: Tensor, bias: Tensor | None, how: tuple[Any, ...]
) -> Tensor:
    stride, padding, dilation, groups, parts = how
    if x.shape[1] // groups != weight.shape[1] or offset.shape[1] != 2 * parts * weight.shape[2] * weight.shape[3]:
        raise ValueError("mmcv._ext.deform_conv: offset and weight do not fit groups and deformable groups")
    return _ops().deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Fills ``output``."""
    how = ((stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group)
    output.copy_(_convolved(input, offset, mask, weight, bias if with_bias else None, how))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    kernel_h: int,
    kernel_w: int,
    stride_h: int,
    stride_w: int,
    pad_h: int,
    pad_w: int,
    dilation_h: int,
    dilation_w: int,
    group: int,
    deformable_group: int,
    with_bias: bool,
) -> None:
    """Fills the five gradients."""
    how = ((stride_h, stride_w), (pad_h, pad_w), (dilation_h, dilation_w), group, deformable_group)

    def forward(x: Tensor, o: Tensor, m: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        return _convolved(x, o, m, w, b, how)

    tensors = (input, offset, mask, weight, bias if with_bias else None)
    found = gradients(forward, tensors, (grad_output,))
    fill((grad_input, grad_offset, grad_mask, grad_weight, grad_bias), found)


def _plain_how(o: dict[str, Any]) -> tuple[Any, ...]:
    return (
        (o["dH"], o["dW"]),
        (o["padH"], o["padW"]),
        (o["dilationH"], o["dilationW"]),
        o["group"],
        o["deformable_group"],
    )


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    **options: Any,
) -> None:
    """Fills ``output``."""
    output.copy_(_convolved(input, offset, None, weight, None, _plain_how(options)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_input: Tensor,
    grad_offset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **options: Any,
) -> None:
    """Fills the gradients of input and offset."""
    how = _plain_how(options)
    found = gradients(lambda x, o: _convolved(x, o, None, weight, None, how), (input, offset), (grad_output,))
    fill((grad_input, grad_offset), found)


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    grad_output: Tensor,
    grad_weight: Tensor,
    columns: Tensor,
    ones: Tensor,
    **options: Any,
) -> None:
    """Adds ``scale`` times the gradient of the weight."""
    how = _plain_how(options)
    weight = torch.zeros_like(grad_weight)
    (found,) = gradients(lambda w: _convolved(input, offset, None, w, None, how), (weight,), (grad_output,))
    assert found is not None
    grad_weight.add_(found, alpha=options.get("scale", 1.0))


def _focal(x: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    if weight.numel():
        raise NotImplementedError("mmcv._ext.sigmoid_focal_loss: weights of classes are not provided by the shim")
    # A target behind the last class is the background.
    one_hot = torch.nn.functional.one_hot(target.long(), x.shape[1] + 1)[:, :-1].to(x.dtype)
    return _ops().sigmoid_focal_loss(x, one_hot, alpha, gamma, "none")


def sigmoid_focal_loss_forward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Fills ``output`` (N, classes)."""
    output.copy_(_focal(input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Fills ``grad_input``, the derivative of each loss by its own logit."""
    found = gradients(lambda x: _focal(x, target, weight, gamma, alpha), (input,), (torch.ones_like(input),))
    fill((grad_input,), found)
