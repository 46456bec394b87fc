"""Fused attention operators: one function per operator, three backends each (reference, torch, triton)."""

from .dispatch import explain, use_backend
from .ops.attention import attention
from .ops.block_attention import block_attention, halo_index, topk_route, window_index
from .ops.linear import linear

__all__ = [
    "attention",
    "block_attention",
    "explain",
    "halo_index",
    "linear",
    "topk_route",
    "use_backend",
    "window_index",
]
