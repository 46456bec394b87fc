"""natten.natten1d of natten 0.15 over attn_core."""

from attn_core.compat.shims.natten_modules import PaddedNeighborhoodAttention1D as NeighborhoodAttention1D

__all__ = ["NeighborhoodAttention1D"]
