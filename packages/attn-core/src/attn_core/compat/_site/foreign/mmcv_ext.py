"""mmcv._ext over attn_core and torchvision; what is not provided says so when it is called."""

from attn_core.compat.shims.mmcv_ext import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
    nms,
    not_provided,
    roi_align_backward,
    roi_align_forward,
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
)
from attn_core.compat.shims.msda import mmcv_ms_deform_attn_backward as ms_deform_attn_backward
from attn_core.compat.shims.msda import ms_deform_attn_forward


def __getattr__(name: str) -> object:
    if name.startswith("__"):
        raise AttributeError(name)
    return not_provided(name)


__attn_core_compat__ = True

__all__ = [
    "deform_conv_backward_input",
    "deform_conv_backward_parameters",
    "deform_conv_forward",
    "modulated_deform_conv_backward",
    "modulated_deform_conv_forward",
    "ms_deform_attn_backward",
    "ms_deform_attn_forward",
    "nms",
    "not_provided",
    "roi_align_backward",
    "roi_align_forward",
    "sigmoid_focal_loss_backward",
    "sigmoid_focal_loss_forward",
]
