"""Attention backbones for vision on one attention core; importing registers them with timm."""

from vision_models.models import create_model, list_models
from vision_models.models.biformer import BiFormer, BiFormerDense
from vision_models.models.cswin import CSwin
from vision_models.models.davit import DaViT, DaViTDense
from vision_models.models.deit import DeiT
from vision_models.models.focalnet import FocalNet, FocalNetDense
from vision_models.models.halonet import HaloNet
from vision_models.models.pvt import PVT
from vision_models.models.ravlt import RAVLT, RAVLTDense
from vision_models.models.swin import Swin, SwinDense
from vision_models.official import load_official

__all__ = [
    "PVT",
    "RAVLT",
    "BiFormer",
    "BiFormerDense",
    "CSwin",
    "DaViT",
    "DaViTDense",
    "DeiT",
    "FocalNet",
    "FocalNetDense",
    "HaloNet",
    "RAVLTDense",
    "Swin",
    "SwinDense",
    "create_model",
    "list_models",
    "load_official",
]

list_models()  # imports every file of models/, which registers its entries with timm
