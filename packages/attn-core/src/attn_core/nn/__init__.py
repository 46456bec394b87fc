"""Modules shared by the packages, one per file."""

from .linear import Linear

__all__ = ["Linear"]
