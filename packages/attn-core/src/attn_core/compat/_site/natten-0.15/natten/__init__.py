"""natten 0.15 over attn_core."""

from . import functional
from .natten1d import NeighborhoodAttention1D
from .natten2d import NeighborhoodAttention2D
from .natten3d import NeighborhoodAttention3D

__version__ = "0.15.1+attn_core"
__attn_core_compat__ = True

__all__ = [
    "NeighborhoodAttention1D",
    "NeighborhoodAttention2D",
    "NeighborhoodAttention3D",
    "functional",
]
