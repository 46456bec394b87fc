"""Data sets, transforms and batches."""

from detection.data.batches import collate_detection
from detection.data.coco import CocoDetection
from detection.data.digits_coco import DigitsCoco
from detection.data.digits_coco_dark import DarkDigitsCoco
from detection.data.low_light import DarkFace, ExDark
from detection.data.transforms import DetectionTransform

__all__ = [
    "CocoDetection",
    "DarkDigitsCoco",
    "DarkFace",
    "DetectionTransform",
    "DigitsCoco",
    "ExDark",
    "collate_detection",
]
