"""mamba_ssm.ops.selective_scan_interface over attn_core."""

from attn_core.compat.shims.mamba import mamba_inner_fn, mamba_inner_ref, selective_scan_fn, selective_scan_ref


def __getattr__(name: str) -> object:
    raise AttributeError(f"mamba_ssm.ops.selective_scan_interface.{name} is not provided by attn_core's shim")


__attn_core_compat__ = True

__all__ = ["mamba_inner_fn", "mamba_inner_ref", "selective_scan_fn", "selective_scan_ref"]
