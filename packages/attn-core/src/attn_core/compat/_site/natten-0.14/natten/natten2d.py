"""natten.natten2d of natten 0.14 over attn_core."""

from attn_core.compat.shims.natten_modules import PaddedNeighborhoodAttention2D as NeighborhoodAttention2D

__all__ = ["NeighborhoodAttention2D"]
