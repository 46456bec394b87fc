"""natten.context of natten 0.20 and later over attn_core: settings of kernels that are not here."""

from attn_core.compat.shims.natten_fused import never as _never
from attn_core.compat.shims.natten_fused import nothing as _nothing

allow_flex_compile = _nothing
allow_flex_compile_backprop = _nothing
disable_flex_compile = _nothing
disable_flex_compile_backprop = _nothing
set_memory_usage_preference = _nothing
use_deterministic_algorithms = _nothing
use_kv_parallelism_in_fused_na = _nothing
are_deterministic_algorithms_enabled = _never
is_flex_compile_allowed = _never
is_flex_compile_backprop_allowed = _never
is_kv_parallelism_in_fused_na_enabled = _never
is_memory_usage_strict = _never
is_memory_usage_unrestricted = _never


def is_memory_usage_default() -> bool:
    """Always."""
    return True


def get_memory_usage_preference() -> str:
    """The only one."""
    return "default"
