"""natten 0.14 over attn_core."""

from . import functional
from .natten1d import NeighborhoodAttention1D
from .natten2d import NeighborhoodAttention2D

__version__ = "0.14.6+attn_core"
__attn_core_compat__ = True

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "functional",
]
