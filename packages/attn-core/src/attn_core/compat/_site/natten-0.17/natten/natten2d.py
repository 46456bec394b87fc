"""natten.natten2d of natten 0.17 over attn_core."""

from attn_core.compat.shims.natten_modules import StrictNeighborhoodAttention2D as NeighborhoodAttention2D

__all__ = ["NeighborhoodAttention2D"]
