"""Assignments of predictions to objects."""

from detection.matchers.hungarian import hungarian_match

__all__ = ["hungarian_match"]
