"""Data sets, transforms and batches."""

from detection.data.batches import collate_detection
from detection.data.coco import CocoDetection
from detection.data.digits_coco import DigitsCoco
from detection.data.transforms import DetectionTransform

__all__ = ["CocoDetection", "DetectionTransform", "DigitsCoco", "collate_detection"]
