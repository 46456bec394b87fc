"""MultiScaleDeformableAttention over attn_core."""

from attn_core.compat.shims.msda import ms_deform_attn_backward, ms_deform_attn_forward

__attn_core_compat__ = True

__all__ = ["ms_deform_attn_backward", "ms_deform_attn_forward"]
