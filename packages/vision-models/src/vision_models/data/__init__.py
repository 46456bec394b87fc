"""Image data sets as the training engine takes them: items ``{"image": float32 (C, Y, X), "label": int}``."""

from vision_models.data.cifar import Cifar
from vision_models.data.digits import Digits
from vision_models.data.imagefolder import ImageFolder
from vision_models.data.images import Preprocess, read_image

__all__ = ["Cifar", "Digits", "ImageFolder", "Preprocess", "read_image"]
