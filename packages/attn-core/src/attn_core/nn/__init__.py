"""Modules shared by the packages, one per file."""

from .gaussian_attention import GaussianAttention, GaussianBlock, importance_factor
from .head_router import HeadGates, HeadRouter, balance_losses, head_gates
from .linear import Linear, through_gelu

__all__ = [
    "GaussianAttention",
    "GaussianBlock",
    "HeadGates",
    "HeadRouter",
    "Linear",
    "balance_losses",
    "head_gates",
    "importance_factor",
    "through_gelu",
]
