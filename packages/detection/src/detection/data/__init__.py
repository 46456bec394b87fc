"""Data sets, transforms and batches."""

from .batches import collate_detection
from .coco import CocoDetection
from .digits_coco import DigitsCoco
from .transforms import DetectionTransform

__all__ = ["CocoDetection", "DetectionTransform", "DigitsCoco", "collate_detection"]
