"""natten.functional of natten 0.20 and later over attn_core."""

from attn_core.compat.shims.natten_fused import (
    attention,
    merge_attentions,
    na1d,
    na2d,
    na3d,
    neighborhood_attention_generic,
)

__all__ = ["attention", "merge_attentions", "na1d", "na2d", "na3d", "neighborhood_attention_generic"]
