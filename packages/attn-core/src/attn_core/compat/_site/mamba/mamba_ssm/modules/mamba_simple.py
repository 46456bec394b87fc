"""mamba_ssm.modules.mamba_simple over attn_core."""

from attn_core.compat.shims.mamba_module import Mamba


def __getattr__(name: str) -> object:
    raise AttributeError(f"mamba_ssm.modules.mamba_simple.{name} is not provided by attn_core's shim")


__attn_core_compat__ = True

__all__ = ["Mamba"]
