"""natten.context of natten 0.17 over attn_core: settings of kernels that are not here."""

from attn_core.compat.shims.natten_fused import has_gpu as _has_gpu
from attn_core.compat.shims.natten_fused import never as _never
from attn_core.compat.shims.natten_fused import nothing as _nothing

has_cuda = _has_gpu
disable_autotuner = _nothing
disable_gemm_na = _nothing
disable_tf32 = _nothing
disable_tiled_na = _nothing
enable_gemm_na = _nothing
enable_tf32 = _nothing
enable_tiled_na = _nothing
set_memory_usage_preference = _nothing
use_autotuner = _nothing
use_deterministic_algorithms = _nothing
use_fna = _nothing
use_fused_na = _nothing
use_gemm_na = _nothing
use_kv_parallelism_in_fused_na = _nothing
use_tf32_in_gemm_na = _nothing
use_tiled_na = _nothing
has_bfloat = _never
has_fna = _never
has_fp32_gemm = _never
has_fp64_gemm = _never
has_fused_na = _never
has_gemm = _never
has_half = _never
has_tf32_gemm = _never
are_deterministic_algorithms_enabled = _never
is_autotuner_enabled = _never
is_autotuner_enabled_for_backward = _never
is_autotuner_enabled_for_forward = _never
is_autotuner_thorough_for_backward = _never
is_autotuner_thorough_for_forward = _never
is_fna_enabled = _never
is_fused_na_enabled = _never
is_gemm_na_enabled = _never
is_kv_parallelism_in_fused_na_enabled = _never
is_memory_usage_strict = _never
is_memory_usage_unrestricted = _never
is_tf32_in_gemm_na_enabled = _never
is_tiled_na_enabled = _never


def is_memory_usage_default() -> bool:
    """Always."""
    return True


def get_memory_usage_preference() -> str:
    """The only one."""
    return "default"
