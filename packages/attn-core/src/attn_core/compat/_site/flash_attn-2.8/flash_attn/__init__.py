"""flash_attn 2.8 over attn_core."""

from attn_core.compat.shims.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)


def __getattr__(name: str) -> object:
    raise AttributeError(f"flash_attn.{name} is not provided by attn_core's shim")


__version__ = "2.8.3+attn_core"

__attn_core_compat__ = True

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
