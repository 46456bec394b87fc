"""Assignments of predictions to objects."""

from .hungarian import hungarian_match

__all__ = ["hungarian_match"]
