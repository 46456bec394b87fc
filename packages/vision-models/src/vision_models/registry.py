"""Our backbones in mmengine's registry, under the scope ``vision_models``; importing this module registers them."""

from mmengine.registry import MODELS as ROOT
from mmengine.registry import Registry

from .biformer import BiFormer, BiFormerDense
from .cswin import CSwin
from .davit import DaViT
from .deit import DeiT
from .focalnet import FocalNet
from .pvt import PVT
from .swin import Swin, SwinDense

MODELS = Registry("model", parent=ROOT, scope="vision_models", locations=["vision_models.registry"])
MODELS.register_module(module=BiFormer)
MODELS.register_module(module=BiFormerDense)
MODELS.register_module(module=DaViT)
MODELS.register_module(module=FocalNet)
MODELS.register_module(module=CSwin)
MODELS.register_module(module=DeiT)
MODELS.register_module(module=PVT)
MODELS.register_module(module=Swin)
MODELS.register_module(module=SwinDense)
