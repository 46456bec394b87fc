"""mamba_ssm over attn_core: Mamba and the selective scan."""

from attn_core.compat.shims.mamba import mamba_inner_fn, selective_scan_fn
from attn_core.compat.shims.mamba_module import Mamba


def __getattr__(name: str) -> object:
    raise AttributeError(f"mamba_ssm.{name} is not provided by attn_core's shim")


__version__ = "2.2.4+attn_core"

__attn_core_compat__ = True

__all__ = ["Mamba", "mamba_inner_fn", "selective_scan_fn"]
