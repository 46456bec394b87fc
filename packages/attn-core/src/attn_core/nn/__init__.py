"""Modules shared by the packages, one per file."""

from .head_router import HeadGates, HeadRouter, balance_losses, head_gates
from .linear import Linear, through_gelu

__all__ = ["HeadGates", "HeadRouter", "Linear", "balance_losses", "head_gates", "through_gelu"]
