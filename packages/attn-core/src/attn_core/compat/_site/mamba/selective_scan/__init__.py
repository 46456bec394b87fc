"""selective_scan over attn_core."""

from attn_core.compat.shims.mamba import selective_scan_fn, selective_scan_ref

__version__ = "0.0.2+attn_core"

__attn_core_compat__ = True

__all__ = ["selective_scan_fn", "selective_scan_ref"]
