"""selective_scan_cuda_oflex over attn_core."""

from attn_core.compat.shims.mamba import bwd_core as bwd
from attn_core.compat.shims.mamba import fwd_oflex as fwd

__attn_core_compat__ = True

__all__ = ["bwd", "fwd"]
