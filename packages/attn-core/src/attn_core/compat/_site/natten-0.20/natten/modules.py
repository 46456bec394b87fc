"""natten.modules of natten 0.20 and later over attn_core."""

from attn_core.compat.shims.natten_fused import (
    NeighborhoodAttention1D,
    NeighborhoodAttention2D,
    NeighborhoodAttention3D,
)

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]
