"""natten.functional of natten 0.15 over attn_core."""

from attn_core.compat.shims import natten_windows as _windows
from attn_core.compat.shims.natten_fused import has_gpu as has_cuda
from attn_core.compat.shims.natten_fused import never as has_bfloat
from attn_core.compat.shims.natten_fused import never as has_gemm
from attn_core.compat.shims.natten_fused import never as has_half
from attn_core.compat.shims.natten_windows import (
    natten1dav,
    natten1dqk,
    natten1dqkrpb,
    natten2dav,
    natten2dqk,
    natten2dqkrpb,
    natten3dav,
    natten3dqk,
    natten3dqkrpb,
)

na1d_qk = _windows.planar_qk[1]
na1d_qk_with_bias = _windows.planar_qk_with_bias[1]
na1d_av = _windows.planar_av
na2d_qk = _windows.planar_qk[2]
na2d_qk_with_bias = _windows.planar_qk_with_bias[2]
na2d_av = _windows.planar_av
na3d_qk = _windows.volume_qk
na3d_qk_with_bias = _windows.volume_qk_with_bias
na3d_av = _windows.volume_av

__all__ = [
    "has_bfloat",
    "has_cuda",
    "has_gemm",
    "has_half",
    "na1d_av",
    "na1d_qk",
    "na1d_qk_with_bias",
    "na2d_av",
    "na2d_qk",
    "na2d_qk_with_bias",
    "na3d_av",
    "na3d_qk",
    "na3d_qk_with_bias",
    "natten1dav",
    "natten1dqk",
    "natten1dqkrpb",
    "natten2dav",
    "natten2dqk",
    "natten2dqkrpb",
    "natten3dav",
    "natten3dqk",
    "natten3dqkrpb",
]
