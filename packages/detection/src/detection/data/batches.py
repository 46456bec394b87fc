"""Batches of pictures of different sizes: lists, one entry per picture."""

from collections.abc import Sequence
from typing import Any


def collate_detection(items: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Items of a detection data set → one list per key.

    ``image`` (3, Y, X) float32 in [0, 1]; ``boxes`` (N, 4) xyxy in pixels of that image; ``labels`` (N,) int64;
    ``image_id`` int; ``original_size`` (Y, X) of the file; ``annotations`` COCO records of the file, for the metric.
    """
    return {key: [item[key] for item in items] for key in items[0]}
