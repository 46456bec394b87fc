"""Fused attention operators: one function per operator, three backends each (reference, torch, triton)."""

from .composites.agent_attention import agent_attention
from .composites.causal_conv1d import causal_conv1d, causal_conv1d_update
from .composites.depth_sampling import depth_scores, scored_deformable_attention
from .composites.inline_attention import inline_attention
from .composites.landmark_attention import landmark_attention
from .composites.neural_memory_weights import neural_memory_weights
from .composites.rank_augmented_attention import rank_augmented_attention
from .composites.routed_heads import routed_heads
from .composites.scatterbrain import scatterbrain
from .composites.visual_attention_redistribution import visual_attention_redistribution
from .dispatch import explain, use_backend
from .ops.additive_attention import additive_attention
from .ops.attention import attention
from .ops.block_attention import block_attention, halo_index, topk_route, window_index
from .ops.block_attention.local_stride import local_stride_table
from .ops.channel_attention import channel_attention
from .ops.deformable_attention import deformable_attention
from .ops.focal_modulation import focal_modulation
from .ops.group_attention import group_attention
from .ops.linear import linear
from .ops.linear_attention import linear_attention
from .ops.linear_scan import linear_scan
from .ops.merge_attention import merge_attention
from .ops.neighborhood_attention import neighborhood_attention
from .ops.neighborhood_scores import neighborhood_scores
from .ops.neighborhood_values import neighborhood_values
from .ops.selective_scan import selective_scan

__all__ = [
    "additive_attention",
    "agent_attention",
    "attention",
    "block_attention",
    "causal_conv1d",
    "causal_conv1d_update",
    "channel_attention",
    "deformable_attention",
    "depth_scores",
    "explain",
    "focal_modulation",
    "group_attention",
    "halo_index",
    "inline_attention",
    "landmark_attention",
    "linear",
    "linear_attention",
    "linear_scan",
    "local_stride_table",
    "merge_attention",
    "neighborhood_attention",
    "neighborhood_scores",
    "neighborhood_values",
    "neural_memory_weights",
    "rank_augmented_attention",
    "routed_heads",
    "scatterbrain",
    "scored_deformable_attention",
    "selective_scan",
    "topk_route",
    "use_backend",
    "visual_attention_redistribution",
    "window_index",
]
