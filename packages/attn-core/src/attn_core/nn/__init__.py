"""Modules shared by the packages, one per file."""

from .linear import Linear, through_gelu

__all__ = ["Linear", "through_gelu"]
