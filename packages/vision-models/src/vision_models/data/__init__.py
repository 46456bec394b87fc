"""Image data sets as the training engine takes them: items ``{"image": float32 (C, Y, X), "label": int}``."""

from .cifar import Cifar
from .digits import Digits
from .imagefolder import ImageFolder
from .images import Preprocess, read_image

__all__ = ["Cifar", "Digits", "ImageFolder", "Preprocess", "read_image"]
