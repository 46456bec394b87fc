"""dfa3D._ext over attn_core."""

from attn_core.compat.shims.msda import (
    ms_depth_score_sample_backward,
    ms_depth_score_sample_forward,
    wms_deform_attn_backward,
    wms_deform_attn_forward,
)

__attn_core_compat__ = True

__all__ = [
    "ms_depth_score_sample_backward",
    "ms_depth_score_sample_forward",
    "wms_deform_attn_backward",
    "wms_deform_attn_forward",
]
