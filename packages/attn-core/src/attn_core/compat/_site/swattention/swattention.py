"""swattention over attn_core."""

from attn_core.compat.shims.swattention import (
    av_backward,
    av_forward,
    qk_backward,
    qk_forward,
    qk_rpb_backward,
    qk_rpb_forward,
)

__attn_core_compat__ = True

__all__ = ["av_backward", "av_forward", "qk_backward", "qk_forward", "qk_rpb_backward", "qk_rpb_forward"]
