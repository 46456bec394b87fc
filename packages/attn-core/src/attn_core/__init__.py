"""Fused attention operators: one function per operator, three backends each (reference, torch, triton)."""

from .dispatch import explain, use_backend
from .ops.additive_attention import additive_attention
from .ops.attention import attention
from .ops.block_attention import block_attention, halo_index, topk_route, window_index
from .ops.channel_attention import channel_attention
from .ops.group_attention import group_attention
from .ops.linear import linear
from .ops.linear_attention import linear_attention
from .ops.linear_scan import linear_scan
from .ops.merge_attention import merge_attention
from .ops.neighborhood_attention import neighborhood_attention
from .ops.selective_scan import selective_scan

__all__ = [
    "additive_attention",
    "attention",
    "block_attention",
    "channel_attention",
    "explain",
    "group_attention",
    "halo_index",
    "linear",
    "linear_attention",
    "linear_scan",
    "merge_attention",
    "neighborhood_attention",
    "selective_scan",
    "topk_route",
    "use_backend",
    "window_index",
]
