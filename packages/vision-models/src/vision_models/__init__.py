"""Attention backbones for vision on one attention core; importing registers them with timm."""

from .biformer import BiFormer, BiFormerDense
from .cswin import CSwin
from .davit import DaViT
from .deit import DeiT
from .focalnet import FocalNet
from .halonet import HaloNet
from .models import create_model, list_models
from .official import load_official
from .pvt import PVT
from .ravlt import RAVLT
from .swin import Swin, SwinDense

__all__ = [
    "PVT",
    "RAVLT",
    "BiFormer",
    "BiFormerDense",
    "CSwin",
    "DaViT",
    "DeiT",
    "FocalNet",
    "HaloNet",
    "Swin",
    "SwinDense",
    "create_model",
    "list_models",
    "load_official",
]
