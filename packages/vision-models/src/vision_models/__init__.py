"""Attention backbones for vision on one attention core; importing registers them with timm.

The command ``vision-models`` alone registers them when a verb runs: its ``--help`` does without timm.
"""

from typing import TYPE_CHECKING

from attn_core.deferred import deferred, running_command
from vision_models.models import create_model, list_models

if TYPE_CHECKING:
    from vision_models.insertion import insert
    from vision_models.models.biformer import BiFormer, BiFormerDense
    from vision_models.models.cswin import CSwin
    from vision_models.models.davit import DaViT, DaViTDense
    from vision_models.models.deit import DeiT
    from vision_models.models.dhvt import DHVT
    from vision_models.models.fan import FAN
    from vision_models.models.focalnet import FocalNet, FocalNetDense
    from vision_models.models.halonet import HaloNet
    from vision_models.models.mambaout import MambaOut, MambaOutDense
    from vision_models.models.nat import NAT, NATDense
    from vision_models.models.pvt import PVT
    from vision_models.models.ravlt import RAVLT, RAVLTDense
    from vision_models.models.rvt import RVT
    from vision_models.models.sparsifiner import Sparsifiner
    from vision_models.models.spectformer import SpectFormer, SpectFormerH
    from vision_models.models.swin import Swin, SwinDense
    from vision_models.models.transnext import TransNeXt
    from vision_models.official import load_official

__all__ = [
    "DHVT",
    "FAN",
    "NAT",
    "PVT",
    "RAVLT",
    "RVT",
    "BiFormer",
    "BiFormerDense",
    "CSwin",
    "DaViT",
    "DaViTDense",
    "DeiT",
    "FocalNet",
    "FocalNetDense",
    "HaloNet",
    "MambaOut",
    "MambaOutDense",
    "NATDense",
    "RAVLTDense",
    "Sparsifiner",
    "SpectFormer",
    "SpectFormerH",
    "Swin",
    "SwinDense",
    "TransNeXt",
    "create_model",
    "insert",
    "list_models",
    "load_official",
]

__getattr__, __dir__ = deferred(
    __name__,
    {
        "vision_models.insertion": ("insert",),
        "vision_models.models.biformer": ("BiFormer", "BiFormerDense"),
        "vision_models.models.cswin": ("CSwin",),
        "vision_models.models.davit": ("DaViT", "DaViTDense"),
        "vision_models.models.deit": ("DeiT",),
        "vision_models.models.dhvt": ("DHVT",),
        "vision_models.models.fan": ("FAN",),
        "vision_models.models.focalnet": ("FocalNet", "FocalNetDense"),
        "vision_models.models.halonet": ("HaloNet",),
        "vision_models.models.mambaout": ("MambaOut", "MambaOutDense"),
        "vision_models.models.nat": ("NAT", "NATDense"),
        "vision_models.models.pvt": ("PVT",),
        "vision_models.models.ravlt": ("RAVLT", "RAVLTDense"),
        "vision_models.models.rvt": ("RVT",),
        "vision_models.models.sparsifiner": ("Sparsifiner",),
        "vision_models.models.spectformer": ("SpectFormer", "SpectFormerH"),
        "vision_models.models.swin": ("Swin", "SwinDense"),
        "vision_models.models.transnext": ("TransNeXt",),
        "vision_models.official": ("load_official",),
    },
)

if running_command() != "vision-models":
    list_models()  # imports every file of models/, which registers its entries with timm
