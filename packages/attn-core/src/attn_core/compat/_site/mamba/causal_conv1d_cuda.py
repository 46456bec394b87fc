"""causal_conv1d_cuda over attn_core, in the forms of 1.0, 1.1 to 1.5 and 1.6."""

from attn_core.compat.shims.causal_conv1d import causal_conv1d_bwd, causal_conv1d_fwd, causal_conv1d_update

__attn_core_compat__ = True

__all__ = ["causal_conv1d_bwd", "causal_conv1d_fwd", "causal_conv1d_update"]
