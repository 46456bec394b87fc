"""Data sets as the training engine takes them; all of it is generated here or stands in the interpreter's library."""

from .geometry import PointBatches, only_item

__all__ = ["PointBatches", "only_item"]
