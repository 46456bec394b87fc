"""natten.na3d of natten 0.17 over attn_core."""

from attn_core.compat.shims.natten_modules import StrictNeighborhoodAttention3D as NeighborhoodAttention3D

__all__ = ["NeighborhoodAttention3D"]
