"""selective_scan_cuda over attn_core."""

from attn_core.compat.shims.mamba import bwd, fwd

__attn_core_compat__ = True

__all__ = ["bwd", "fwd"]
