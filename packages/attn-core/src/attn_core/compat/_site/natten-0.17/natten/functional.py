"""natten.functional of natten 0.17 over attn_core."""

from attn_core.compat.shims import natten_windows as _windows
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

na1d_qk = _windows.na_qk[1]
na1d_av = _windows.na_av[1]
na1d = _windows.na_fused[1]
na2d_qk = _windows.na_qk[2]
na2d_av = _windows.na_av[2]
na2d = _windows.na_fused[2]
na3d_qk = _windows.na_qk[3]
na3d_av = _windows.na_av[3]
na3d = _windows.na_fused[3]

__all__ = [
    "na1d",
    "na1d_av",
    "na1d_qk",
    "na2d",
    "na2d_av",
    "na2d_qk",
    "na3d",
    "na3d_av",
    "na3d_qk",
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
