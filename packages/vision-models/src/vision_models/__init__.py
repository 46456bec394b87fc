"""Attention backbones for vision on one attention core; importing registers them with timm."""

from .biformer import BiFormer, BiFormerDense
from .davit import DaViT
from .focalnet import FocalNet
from .models import create_model, list_models
from .official import load_official

__all__ = ["BiFormer", "BiFormerDense", "DaViT", "FocalNet", "create_model", "list_models", "load_official"]
