"""causal_conv1d over attn_core."""

from attn_core.compat.shims.causal_conv1d import causal_conv1d_fn
from attn_core.compat.shims.causal_conv1d import causal_conv1d_update_fn as causal_conv1d_update

__version__ = "1.5.0+attn_core"

__attn_core_compat__ = True

__all__ = ["causal_conv1d_fn", "causal_conv1d_update"]
